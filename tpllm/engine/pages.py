"""Pages of the KV cache: who holds them, which may be taken, and what is known to be in them. Host integers only.

A page is *held* by as many rows as it has references. One that nobody holds is *free*, or, where the prefix cache knows its content, *idle*:
it can be held again for that content until it is taken for something else, the one longest idle first.

Content is known by a key, so that two rows whose contexts begin alike share the pages of what they have in common:

    key_0 = H(salt, tokens of page 0);   key_i = H(key_{i-1}, tokens of page i)

A key stands for all tokens up to the end of its page, with everything else that their keys and values depend on in the salt: the engine's model,
mesh and dtypes never change, which leaves the length of the prompt where the rope depends on it. H is BLAKE2b (RFC 7693) of 16 bytes: prompts are
other people's, and a key that two contents could be given would show one to the other.
"""
import collections
import hashlib
from collections.abc import Hashable, Iterable, Iterator

import numpy as np

from tpllm.engine.request import Sequence

KEY_BYTES = 16


class PagePool:
    """The pages of one data group; every operation is O(1) a page.

    Args:
        num_pages: pages 0 to ``num_pages - 1``.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self.num_references = [0] * num_pages
        self._free = collections.deque(range(num_pages))
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._key_of: dict[int, Hashable] = {}
        self._page_of: dict[Hashable, int] = {}

    @property
    def num_available(self) -> int:
        """Pages that :meth:`take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        """Pages that rows hold."""
        return self.num_pages - self.num_available

    @property
    def num_known(self) -> int:
        """Pages whose content the prefix cache knows."""
        return len(self._key_of)

    def take(self) -> int | None:
        """A page for new content, held once; None where every page is held."""
        if self._free:
            page = self._free.popleft()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        else:
            return None
        self.num_references[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Hold a page once more, for the content it has."""
        self._idle.pop(page, None)
        self.num_references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Release a row's pages, given in order; its last ones become idle first, so that they are the first to be taken."""
        for page in reversed(list(pages)):
            self.num_references[page] -= 1
            if self.num_references[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def is_shared(self, page: int) -> bool:
        """Whether several rows hold it, so that none may write to it."""
        return self.num_references[page] > 1

    def learn(self, page: int, key: Hashable) -> None:
        """Note the key of a held page's content, unless the key has a page or the page a key already."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def find(self, key: Hashable) -> int | None:
        """The page that has this content."""
        return self._page_of.get(key)

    def forget(self, pages: Iterable[int]) -> None:
        """Forget what some held pages contain."""
        for page in pages:
            if page in self._key_of:
                self._forget(page)

    def forget_all(self) -> None:
        """Forget what every page contains; rows keep the pages that they hold."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._key_of.clear()
        self._page_of.clear()

    def _forget(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]


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
        """The known pages of the beginning of a row's context. Its last token is never among them: it is computed to draw the next one."""
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
        """Learn the pages that hold the first ``num_tokens`` tokens of a row."""
        if not self.is_enabled or num_tokens < (sequence.num_pages_known + 1) * self.page_size:
            return
        num_full = self._num_shared_pages(num_tokens)
        for index, key in enumerate(self._keys(sequence, num_full)):
            if index >= sequence.num_pages_known:
                self.pool.learn(sequence.pages[index], key)
        sequence.num_pages_known = max(num_full, sequence.num_pages_known)

    def _num_shared_pages(self, num_tokens: int) -> int:
        """How many pages of so many tokens may be shared: those of whole multiples of the granularity."""
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
