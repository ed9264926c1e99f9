"""Keys of pages by content: two rows whose contexts begin alike share the pages of what they have in common.

    key_0 = H(salt, tokens of page 0);   key_i = H(key_{i-1}, tokens of page i)

so that a key stands for all tokens up to the end of its page, with everything else that their keys and values depend on in the salt: the
engine's model, mesh and dtypes never change, which leaves the length of the prompt where the rope depends on it. H is BLAKE2b (RFC 7693) of
16 bytes: prompts are other people's, and a key that two contents could be given would show one to the other.
"""
import hashlib
from collections.abc import Iterator

import numpy as np

from tpllm.engine.page_pool import PagePool
from tpllm.engine.request import Sequence

KEY_BYTES = 16


class PrefixCache:
    """Finds and remembers the pages of one pool by what is in them.

    Args:
        pool: the pages.
        page_size: tokens a page.
        granularity: tokens; only multiples of it are shared, a multiple of ``page_size`` itself.
        depends_on_prompt_len: whether keys and values depend on the length of the prompt.
        is_enabled: False finds and remembers nothing.
    """

    def __init__(self, pool: PagePool, *, page_size: int, granularity: int, depends_on_prompt_len: bool = False, is_enabled: bool = True):
        self.pool, self.page_size, self.is_enabled = pool, page_size, is_enabled
        self._granularity, self._depends_on_prompt_len = granularity, depends_on_prompt_len

    def find(self, sequence: Sequence) -> list[int]:
        """The pages that hold the beginning of a row's context, short of its last token: that one gives the next."""
        if not self.is_enabled or sequence.wants_prompt_logprobs:
            return []
        found: list[int] = []
        for key in self._keys(sequence, self._num_shared_pages(sequence.context_len - 1)):
            page = self.pool.find(key)
            if page is None:
                break
            found.append(page)
        return found[:self._num_shared_pages(len(found) * self.page_size)]

    def remember(self, sequence: Sequence, num_tokens: int) -> None:
        """Make a row's pages known whose content its first ``num_tokens`` tokens are."""
        if not self.is_enabled or num_tokens < (sequence.num_pages_known + 1) * self.page_size:
            return
        num_full = self._num_shared_pages(num_tokens)
        for index, key in enumerate(self._keys(sequence, num_full)):
            if index >= sequence.num_pages_known:
                self.pool.learn(sequence.pages[index], key)
        sequence.num_pages_known = max(num_full, sequence.num_pages_known)

    def _num_shared_pages(self, num_tokens: int) -> int:
        """Pages of the multiples of the granularity that so many tokens make."""
        return num_tokens // self._granularity * self._granularity // self.page_size

    def _keys(self, sequence: Sequence, count: int) -> Iterator[bytes]:
        """The keys of the first ``count`` pages, computed once a row."""
        keys, size = sequence.page_keys, self.page_size
        for index in range(count):
            if index == len(keys):
                tokens = np.array(sequence.context(index * size, (index + 1) * size), np.int32).tobytes()
                keys.append(hashlib.blake2b(tokens, key=keys[-1] if keys else self._salt(sequence), digest_size=KEY_BYTES).digest())
            yield keys[index]

    def _salt(self, sequence: Sequence) -> bytes:
        return f"{sequence.prompt_len if self._depends_on_prompt_len else ''}".encode()
