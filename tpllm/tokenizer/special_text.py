"""Keeps special-token text that stands in a user's strings from becoming special tokens once a template has placed it.

Before rendering, each such text is replaced by a marker of letters and digits that nobody can guess; afterwards the markers show which text
is the user's. So templates may trim, split, search and JSON-encode their input, and special tokens are only those that the template writes.
Also replaced is an end of a string that begins a special token (or a start that ends one), so that two strings cannot make one together.
What is not prevented: a template that removes text from the middle of a string can join what was on both sides.
"""
import re
import secrets
from collections.abc import Callable, Iterable


class SpecialTextGuard:
    """Markers for one rendering.

    Args:
        special_texts: texts of the special tokens.
    """

    def __init__(self, special_texts: Iterable[str]):
        texts = sorted({text for text in special_texts if text}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._starts = {text[:size] for text in texts for size in range(1, len(text))}
        self._ends = {text[size:] for text in texts for size in range(1, len(text))}
        self._longest = max((len(text) for text in texts), default=0)
        self._nonce = f"x{secrets.token_hex(12)}x"
        self._marker = re.compile(self._nonce + "([0-9]+)x", re.IGNORECASE)  # a template may change the case
        self._hidden: list[str] = []

    def hide(self, value):
        """The JSON value with markers for special-token text, in its keys too."""
        if isinstance(value, str):
            return self._hide_text(value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list) else value

    def has_hidden(self, text: str) -> bool:
        """Whether the text holds a marker."""
        return bool(self._hidden) and self._marker.search(text) is not None

    def restore(self, text: str) -> str:
        """The text with what the markers stand for."""
        return self._marker.sub(self._original, text) if self._hidden else text

    def _original(self, match: re.Match) -> str:
        index = int(match[1])
        return self._hidden[index] if index < len(self._hidden) else match[0]

    def _hide_text(self, text: str) -> str:
        size = next((size for size in range(min(self._longest, len(text)), 0, -1) if text[-size:] in self._starts), 0)
        tail, text = text[len(text) - size:], text[:len(text) - size]
        size = next((size for size in range(min(self._longest, len(text)), 0, -1) if text[:size] in self._ends), 0)
        head, text = text[:size], text[size:]
        return self._mark(head) + self._special.sub(lambda match: self._mark(match[0]), text) + self._mark(tail)

    def _mark(self, text: str) -> str:
        if not text:
            return ""
        self._hidden.append(text)
        return f"{self._nonce}{len(self._hidden) - 1}x"


def encode_guarded(encoding, text: str, *, guard: SpecialTextGuard, is_boundary: Callable[[int, str], bool],
                   encode_plain: Callable[..., list[int]]) -> list[int]:
    """Ids of a rendered text: stretches between special tokens that hold a marker are encoded again, as plain text.

    Args:
        encoding: of ``text`` with its special tokens parsed.
        text: rendered, with markers.
        guard: made the markers.
        is_boundary: whether a token id over a text span is a special token that the text writes.
        encode_plain: ``(text, is_start=...)`` to ids, where no special token is parsed.
    """
    ids, stretch, begin = [], [], 0

    def close(end: int) -> None:
        part = text[begin:end]
        ids.extend(encode_plain(guard.restore(part), is_start=begin == 0) if guard.has_hidden(part) else stretch)
        stretch.clear()

    for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if is_boundary(token_id, text[start:end]):
            close(start)
            ids.append(token_id)
            begin = end
        else:
            stretch.append(token_id)
    close(len(text))
    return ids
