"""Text that knows which of its characters came from a user, whatever a chat template makes of it.

To a template it is a text like any other: it compares, searches, splits and prints as the same ``str`` does. What its methods give knows the origin
of each character, too. Where that cannot be told (a text that another one of the user's formats, one whose length changes with its case), the
whole result counts as the user's.
"""
from __future__ import annotations

import bisect
import itertools
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jinja2
import markupsafe

Spans = tuple[tuple[int, int], ...]
"""(start, end) of each stretch of a user's characters, in order, none of them empty."""

MAX_PIECES = 100_000
"""Pieces whose origins are told apart; a text of more counts as the user's."""
_STAND_IN = "\U0010fffd"  # for a user's character, where a method is called again to see where the characters go
_RUNS = re.compile(f"{_STAND_IN}+")


class TracedText(str):
    """A text, and which stretches of it are a user's.

    Args:
        text: what it says.
        spans: None is all of it.
    """

    __slots__ = ("spans",)

    def __new__(cls, text: str, spans: Spans | None = None):
        made = super().__new__(cls, text)
        made.spans = _whole(text) if spans is None else spans
        return made

    def __str__(self) -> TracedText:
        return self

    def __iter__(self) -> Iterator[TracedText]:
        return (self.cut(index, index + 1) for index in range(len(self)))

    def __getitem__(self, key) -> TracedText:
        if not isinstance(key, slice):
            index = range(len(self))[key] if isinstance(key, int) else key
            return self.cut(index, index + 1) if isinstance(key, int) else str.__getitem__(self, key)
        start, stop, step = key.indices(len(self))
        return self.cut(start, stop) if step == 1 else self._like_all(str.__getitem__(self, key))

    def __add__(self, other: str) -> TracedText:
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> TracedText:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: int) -> TracedText:
        made = str.__mul__(self, times)
        return self._like_all(made) if self._is_of_one_origin or times > MAX_PIECES else joined([self] * times)

    __rmul__ = __mul__

    def __mod__(self, values) -> TracedText:
        return filled(self, str.__mod__, (self, values))

    def __rmod__(self, template: str) -> TracedText:
        return TracedText(template, spans_of(template)) % self

    def join(self, items: Iterable[str]) -> TracedText:
        return joined([piece for item in items for piece in (self, item)][1:])

    def replace(self, old: str, new: str, count: int = -1) -> TracedText:
        made = str.replace(self, old, new, count)
        if not old or str.count(self, old) > MAX_PIECES:
            return TracedText(made, None if self.spans or spans_of(new) else ())
        return TracedText(new, spans_of(new)).join(self.split(old, count))

    def split(self, sep: str | None = None, maxsplit: int = -1) -> list[TracedText]:
        return self._cut_at(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: int = -1) -> list[TracedText]:
        return self._cut_at(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[TracedText]:
        start, lines = 0, []
        for line, with_end in zip(str.splitlines(self, keepends), str.splitlines(self, True), strict=True):
            lines.append(self.cut(start, start + len(line)))
            start += len(with_end)
        return lines

    def partition(self, sep: str) -> tuple[TracedText, ...]:
        return tuple(self._cut_at(str.partition(self, sep), ""))

    def rpartition(self, sep: str) -> tuple[TracedText, ...]:
        return tuple(self._cut_at(str.rpartition(self, sep), ""))

    def strip(self, chars: str | None = None) -> TracedText:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> TracedText:
        return self.cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None) -> TracedText:
        return self.cut(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str) -> TracedText:
        return self.cut(len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str) -> TracedText:
        return self.cut(0, len(str.removesuffix(self, suffix)))

    def cut(self, start: int, end: int) -> TracedText:
        """Characters from ``start`` to before ``end``, both within the text."""
        if not self.spans or self.spans[0] == (0, len(self)):
            return TracedText(str.__getitem__(self, slice(start, end)), None if self.spans else ())
        first = bisect.bisect_right(self.spans, start, key=operator.itemgetter(1))
        spans = itertools.takewhile(lambda span: span[0] < end, self.spans[first:first + end - start])
        kept = tuple((max(span[0], start) - start, min(span[1], end) - start) for span in spans) if start < end else ()
        return TracedText(str.__getitem__(self, slice(start, end)), kept)

    @property
    def _is_of_one_origin(self) -> bool:
        return not self.spans or self.spans == ((0, len(self)),)

    def _like_all(self, made: str) -> TracedText:
        """Something made of these characters only: the user's if any of them is."""
        return TracedText(made, None if self.spans else ())

    def _cut_at(self, pieces: Sequence[str], sep: str | None) -> list[TracedText]:
        """Pieces that stand in the text in this order, with a separator between two; None is any white space."""
        if self._is_of_one_origin:
            return [self._like_all(piece) for piece in pieces]
        start, found = 0, []
        for piece in pieces:
            start = str.find(self, piece, start) if sep is None else start
            found.append(self.cut(start, start + len(piece)))
            start += len(piece) + len(sep or "")
        return found


class SafeText(markupsafe.Markup):
    """As :class:`TracedText`, safe to stand in HTML; whatever is made of it by escaping counts as the user's."""

    __slots__ = ("spans",)

    def __new__(cls, text: object = "", encoding: str | None = None, errors: str = "strict"):
        made = super().__new__(cls, text, encoding, errors)
        made.spans = text.spans if isinstance(text, TracedText) else _whole(made)
        return made

    def __str__(self) -> TracedText:
        return TracedText(str.__str__(self), self.spans)


def joined(pieces: Iterable[str]) -> TracedText:
    """The pieces one after the other."""
    pieces, spans, start = list(pieces), [], 0
    for piece in pieces:
        for first, last in spans_of(piece):
            if spans and spans[-1][1] == start + first:
                spans[-1] = (spans[-1][0], start + last)
            else:
                spans.append((start + first, start + last))
        start += len(piece)
    return TracedText("".join(pieces), tuple(spans))


def spans_of(text: str) -> Spans:
    """The user's part of a text. What is ``str`` itself stands in a template; text of any other class (marked as safe HTML) may be anybody's."""
    if isinstance(text, TracedText | SafeText):
        return text.spans
    return () if type(text) is str else _whole(text)


def by_character(text: str, change: Callable[[str], str]) -> TracedText:
    """What a function that works character by character makes of a text."""
    made, spans = change(str.__str__(text)), spans_of(text)
    if spans == _whole(text) or len(made) == len(text):
        return TracedText(made, _whole(made) if spans == _whole(text) else spans)
    pieces = [change(piece) for piece in _alternating(text)]
    if "".join(pieces) != made:
        return TracedText(made, None if spans else ())
    return joined(TracedText(piece, None if index % 2 else ()) for index, piece in enumerate(pieces))


def filled(template: str, method: Callable[..., str], args: tuple, kwargs: Mapping | None = None) -> TracedText:
    """What ``method(*args, **kwargs)`` makes of a template's fields. The user's characters are found by making it once more, with stand-ins."""
    kwargs = kwargs or {}
    made = str.__str__(method(*args, **kwargs))
    if spans_of(template):
        return TracedText(made)
    try:
        shadow = str.__str__(method(*stand_ins(args), **stand_ins(kwargs)))
    except Exception:  # a field that wants what stands there, and no stand-in
        return TracedText(made)
    spans = tuple(match.span() for match in _RUNS.finditer(shadow))
    is_same = len(made) == len(shadow) and _alternating(TracedText(made, spans))[::2] == _alternating(TracedText(shadow, spans))[::2]
    return TracedText(made, spans if is_same else None)


def stand_ins(value):
    """The value with every character of the user's replaced by one that no text holds.

    Raises:
        TypeError: it may hold a user's text where none can be replaced.
    """
    if isinstance(value, str):
        return "".join(_STAND_IN * len(piece) if index % 2 else piece for index, piece in enumerate(_alternating(value)))
    if isinstance(value, Mapping):
        return _Fields((key, stand_ins(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(map(stand_ins, value))
    if is_nobodys(value):
        return value
    raise TypeError(f"no stand-in for a {type(value).__name__}")


def is_nobodys(value: object) -> bool:
    """Whether a value that is no text and holds no others is nobody's: a number, or none."""
    return value is None or isinstance(value, int | float | jinja2.Undefined)


class _Fields(dict):
    """Values by their own keys, which it shows where none is a user's."""

    def __repr__(self) -> str:
        if stand_ins(list(self)) != list(self):
            raise TypeError("no stand-in for keys")
        return super().__repr__()


def _alternating(text: str) -> list[str]:
    """The text cut at its spans: what is not the user's, what is, and so on; the first and the last are not."""
    edges = [0, *itertools.chain.from_iterable(spans_of(text)), len(text)]
    return [str.__getitem__(text, slice(*ends)) for ends in itertools.pairwise(edges)]


def _whole(text: str) -> Spans:
    return ((0, len(text)),) if text else ()


def _padding(name: str) -> Callable[..., TracedText]:
    method = getattr(str, name)
    return lambda self, width, *fill: filled("", method, (self, width, *fill))


def _casing(name: str) -> Callable[[TracedText], TracedText]:
    method = getattr(str, name)
    return lambda self: by_character(self, method)


for _name in ("center", "ljust", "rjust", "zfill"):
    setattr(TracedText, _name, _padding(_name))
for _name in ("capitalize", "casefold", "lower", "swapcase", "title", "upper"):
    setattr(TracedText, _name, _casing(_name))
