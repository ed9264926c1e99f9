"""Keeps a user's text from becoming special tokens once a template has placed it.

A rendered text knows which of its characters are the user's (:mod:`~tpllm.tokenizer.traced_text`). A special token that holds one of them is no
special token: the user's characters in it are replaced by a marker of letters and digits that nobody can guess, until the tokenizer finds no such
token any more. Then the stretches between the special tokens that are the template's own are encoded as plain text, with what the markers stand for.
So templates act on messages as they are, and special tokens are those that the template writes itself.
"""
import re
import secrets
from collections.abc import Callable, Iterator

from tpllm.errors import PromptError
from tpllm.tokenizer.traced_text import TracedText, joined

MAX_ROUNDS = 20


class MarkedText:
    """A text in which parts of the user's may be replaced by markers.

    Args:
        text: rendered.
    """

    def __init__(self, text: TracedText):
        self.text = text
        self._nonce = f"x{secrets.token_hex(12)}x"
        self._marker = re.compile(self._nonce + "([0-9]+)x")
        self._hidden: list[str] = []

    def hide(self, spans: list[tuple[int, int]]) -> None:
        """Replace what is the user's in stretches of the text, which are in order."""
        pieces, done = [], 0
        for start, end in spans:
            for first, last in self.text.cut(start, end).spans:
                pieces += [self.text.cut(done, start + first), TracedText(f"{self._nonce}{len(self._hidden)}x", ())]
                self._hidden.append(str.__str__(self.text.cut(start + first, start + last)))
                done = start + last
        self.text = joined([*pieces, self.text.cut(done, len(self.text))])

    def has_hidden(self, part: str) -> bool:
        """Whether a part of the text holds a marker."""
        return bool(self._hidden) and self._nonce in part

    def restore(self, part: str) -> str:
        """The part with what its markers stand for."""
        return self._marker.sub(lambda match: self._hidden[int(match[1])], part)


def encode_guarded(text: TracedText, *, encode: Callable, special_span: Callable, encode_plain: Callable[..., list[int]]) -> list[int]:
    """Ids of a rendered text in which only special tokens without a character of the user's are special.

    Args:
        text: rendered.
        encode: text to the library's encoding, with special tokens parsed.
        special_span: ``(token id, (start, end), text)`` to where the token's own text is, None where the id is no special token there.
        encode_plain: ``(text, is_start=...)`` to ids, where no special token is parsed.

    Raises:
        PromptError: the user's text cannot be told from a special token of this tokenizer.
    """
    marked = MarkedText(text)
    for _ in range(MAX_ROUNDS):
        encoding = encode(str.__str__(marked.text))
        found = [special_span(token_id, offsets, marked.text) for token_id, offsets in zip(encoding.ids, encoding.offsets, strict=True)]
        forged = [span for span in found if span is not None and marked.text.cut(*span).spans]
        if not forged:
            return list(_ids(encoding, [span is not None for span in found], marked=marked, encode_plain=encode_plain))
        marked.hide(forged)
    raise PromptError("the messages hold the text of special tokens, which this tokenizer cannot take as plain text; remove it, or allow it with "
                      "parse_special=True")


def _ids(encoding, is_special: list[bool], *, marked: MarkedText, encode_plain: Callable[..., list[int]]) -> Iterator[int]:
    """Stretches between special tokens that hold a marker are encoded again, as plain text."""
    text, stretch, begin = str.__str__(marked.text), [], 0
    for token_id, (start, end), special in zip(encoding.ids, encoding.offsets, is_special, strict=True):
        if not special:
            stretch.append(token_id)
            continue
        yield from _stretch(text[begin:start], stretch, marked=marked, encode_plain=encode_plain, is_start=begin == 0)
        yield token_id
        stretch, begin = [], end
    yield from _stretch(text[begin:], stretch, marked=marked, encode_plain=encode_plain, is_start=begin == 0)


def _stretch(part: str, ids: list[int], *, marked: MarkedText, encode_plain: Callable[..., list[int]], is_start: bool) -> list[int]:
    return encode_plain(marked.restore(part), is_start=is_start) if marked.has_hidden(part) else ids
