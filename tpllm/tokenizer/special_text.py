"""Keeps a user's text from becoming special tokens once a template has placed it.

A rendered text knows which of its characters are the user's (:mod:`~tpllm.tokenizer.traced_text`). A special token that holds one of them is no
special token: the user's characters in it are replaced by a marker of letters and digits that nobody can guess, until the tokenizer finds no such
token any more. Then the stretches between the special tokens that are the template's own are encoded as plain text, with what the markers stand for.
So templates act on messages as they are, and special tokens are those that the template writes itself.
"""
import re
import secrets
from collections.abc import Callable, Iterable, Iterator

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

    @property
    def has_any(self) -> bool:
        """Whether anything is hidden."""
        return bool(self._hidden)

    def has_hidden(self, part: str) -> bool:
        """Whether a part of the text holds a marker."""
        return self._nonce in part

    def restore(self, part: str) -> str:
        """The part with what its markers stand for."""
        return self._marker.sub(lambda match: self._hidden[int(match[1])], part)


def encode_guarded(text: TracedText, *, special_ids: frozenset[int], encode: Callable, special_span: Callable,
                   encode_plain: Callable[..., list[int]]) -> list[int]:
    """Ids of a rendered text in which only special tokens without a character of the user's are special.

    Args:
        text: rendered.
        special_ids: of the tokens to guard.
        encode: text to the library's encoding, with special tokens parsed.
        special_span: ``(token id, (start, end), text)`` to where the token's own text is, None where the id is no special token there.
        encode_plain: ``(text, is_start=...)`` to ids, where no special token is parsed.

    Raises:
        PromptError: the user's text cannot be told from a special token of this tokenizer.
    """
    marked = MarkedText(text)
    for _ in range(MAX_ROUNDS):
        encoding = encode(str.__str__(marked.text))
        ids = encoding.ids
        spans = {index: special_span(ids[index], _place(encoding, index), marked.text)
                 for index, token_id in enumerate(ids) if token_id in special_ids}
        found = {index: span for index, span in spans.items() if span is not None}
        forged = [span for span in found.values() if marked.text.cut(*span).spans]
        if not forged:
            return list(_ids(encoding, found, marked=marked, encode_plain=encode_plain)) if marked.has_any else ids
        marked.hide(forged)
    raise PromptError("the messages hold the text of special tokens, which this tokenizer cannot take as plain text; remove it, or allow it with "
                      "parse_special=True")


def _ids(encoding, special: Iterable[int], *, marked: MarkedText, encode_plain: Callable[..., list[int]]) -> Iterator[int]:
    """Stretches between special tokens that hold a marker are encoded again, as plain text."""
    text, ids, first, begin = str.__str__(marked.text), encoding.ids, 0, 0
    for index in special:
        start, end = _place(encoding, index)
        yield from _stretch(text[begin:start], ids[first:index], marked=marked, encode_plain=encode_plain, is_start=begin == 0)
        yield ids[index]
        first, begin = index + 1, end
    yield from _stretch(text[begin:], ids[first:], marked=marked, encode_plain=encode_plain, is_start=begin == 0)


def _place(encoding, index: int) -> tuple[int, int]:
    """Where a token's characters are. The list of all places is made only where a post-processor has left the token without a text of its own."""
    return encoding.token_to_chars(index) or encoding.offsets[index]


def _stretch(part: str, ids: list[int], *, marked: MarkedText, encode_plain: Callable[..., list[int]], is_start: bool) -> list[int]:
    return encode_plain(marked.restore(part), is_start=is_start) if marked.has_hidden(part) else ids
