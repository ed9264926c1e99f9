"""The tokenizers library behind a border: it is written in Rust, and what panics there passes every ``except Exception``."""
import contextlib
import functools
import json
from collections.abc import Iterator, Sequence

import tokenizers

from tpllm.errors import TokenizerError, TpllmError, short
from tpllm.tokenizer.folder import TokenizerFolder
from tpllm.tokenizer.tokenizer_json import read_tokenizer_json

FIX = "fetch the tokenizer's files again, or update the tokenizers package"
OTHERS = (TpllmError, KeyboardInterrupt, SystemExit, GeneratorExit)


def library_of(folder: TokenizerFolder) -> tokenizers.Tokenizer:
    """What tokenizer.json holds, as tokenizer_config.json's flags change it.

    Raises:
        TokenizerError: it is damaged.
    """
    text = read_tokenizer_json(folder)
    with border(f"{folder.path / 'tokenizer.json'} cannot be read"):
        return tokenizers.Tokenizer.from_str(text)


@contextlib.contextmanager
def border(failing: str, *, fix: str = FIX) -> Iterator[None]:
    """Whatever fails inside becomes a :class:`TokenizerError` that says what failed and what to do; a user's interrupt stays one."""
    try:
        yield
    except OTHERS:
        raise
    except BaseException as error:  # a panic is one
        raise TokenizerError(f"{failing} ({type(error).__name__}: {short(str(error))}); {fix}") from error


class Backend:
    """A tokenizer of the library; it is never changed after loading, so threads may share it.

    Args:
        library: the tokenizer.
        guarded_ids: tokens that :attr:`plain` does not find, beside those that are special to the library.
    """

    def __init__(self, library: tokenizers.Tokenizer, guarded_ids: frozenset[int] = frozenset()):
        self.rust, self._guarded_ids = library, guarded_ids

    def encode(self, text: str) -> tokenizers.Encoding:
        """Ids and their places in the text, without what a post-processor adds."""
        with border("the tokenizer fails on a text"):
            return self.rust.encode(text, add_special_tokens=False)

    def post_process(self, encoding: tokenizers.Encoding) -> tokenizers.Encoding:
        """The ids with those that the post-processor adds."""
        with border("the tokenizer fails on a text"):
            return self.rust.post_process(encoding)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids that are in the vocabulary."""
        with border("the tokenizer fails on token ids"):
            return self.rust.decode(list(token_ids), skip_special_tokens=False)

    @functools.cached_property
    def plain(self) -> "Backend":
        """One that takes special-token text as plain text. It is a second tokenizer, because the attribute cannot be changed while another thread
        encodes."""
        return self._copy(self._json)

    @functools.cached_property
    def following(self) -> "Backend":
        """As :attr:`plain`, for a text that is not the start of a prompt: SentencePiece's space goes before the first word of a prompt only."""
        return self._copy(self._json.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"'))

    @property
    def _json(self) -> str:
        with border("the tokenizer cannot be copied"):
            text = self.rust.to_str()
        if not self._guarded_ids:
            return text
        root = json.loads(text)
        for token in root["added_tokens"]:
            token["special"] = token["special"] or token["id"] in self._guarded_ids
        return json.dumps(root, ensure_ascii=False, separators=(",", ":"))

    def _copy(self, text: str) -> "Backend":
        with border("the tokenizer cannot be copied"):
            copy = tokenizers.Tokenizer.from_str(text)
            copy.encode_special_tokens = True
            return Backend(copy)
