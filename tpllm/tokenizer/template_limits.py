"""What a chat template may use up: a template is a program that came with somebody's model, and it runs for each row of a job.

Python can stop a thread neither from outside nor within one call of its own. So time is looked at wherever a template can go on for long
(each turn of a loop, each call, filter and operator), and what is done in one call is bounded by the size of what goes in.
"""
import re
import time
from collections.abc import Iterable, Mapping

MAX_SECONDS = 1.0
"""Of the thread's own computing time: what else the machine does must not decide whether a row can be run."""
MAX_BYTES = 4_000_000
"""Of the rendered text, and about of any value on the way."""
MAX_MADE = 64 * MAX_BYTES
"""Characters of all values on the way together; those of which a loop makes a text bit by bit count each time."""
MAX_INT_BITS = 4096
MAX_PRECISION = 1000
MAX_STRIPPED = 1000
"""Characters that ``strip`` and ``trim`` look for: each of the text's is compared with each of them."""

CELL = 8  # what an element weighs besides its content
MAX_KNOWN = 16  # values whose weight is remembered
_PERCENT_FIELD = re.compile(r"%(?:\([^()]*\))?[^A-Za-z%]*")
_BRACE_FIELD = re.compile(r"\{[^{}]*")
_HIDDEN_WIDTH = re.compile(r"%[-+ #0-9.]*\*|%\([^)]*\(")
_DIGITS = re.compile(r"\d+")


class TemplateLimitError(Exception):
    """A limit that a template came to. No ``ValueError``: some of Jinja's filters take those for bad input and go on."""


class Budget:
    """What one rendering may still use.

    Args:
        messages: whose weights are remembered, since templates cut and join lists of them.
    """

    def __init__(self, messages: Iterable[object]):
        self._cpu_start, self._next_look = time.thread_time(), time.perf_counter() + MAX_SECONDS
        self._num_made = 0
        self._known: dict[int, tuple[object, int]] = {}
        self._messages = {id(message): (message, self.weigh(message)) for message in messages}
        self._known = dict(self._messages)

    def check_time(self) -> None:
        """Stop a template that computes for too long."""
        now = time.perf_counter()
        if now > self._next_look:
            left = MAX_SECONDS - (time.thread_time() - self._cpu_start)
            if left <= 0:
                raise TemplateLimitError(f"runs for over {MAX_SECONDS:g} s")
            self._next_look = now + left

    def take(self, value):
        """Count a value that was made; returns it."""
        self.check_time()
        if isinstance(value, str):
            self.allow(len(value))
            self._num_made += len(value)
        elif isinstance(value, Mapping | list | tuple):
            self.allow(self.weigh(value))
            self._num_made += CELL * len(value)  # what is in them was counted when it was made
        elif isinstance(value, int):
            self.allow(value.bit_length())
        if self._num_made > MAX_MADE:
            raise TemplateLimitError(f"makes values of over {MAX_MADE // 1_000_000} MB together")
        return value

    def allow(self, size: float) -> None:
        """Stop before, or after, a value of this size is made."""
        if size > MAX_BYTES:
            raise TemplateLimitError(f"makes a value of over {MAX_BYTES // 1_000_000} MB")

    def allow_int(self, *values: object) -> None:
        """Stop arithmetic with numbers of over a thousand digits: its time grows faster than they do."""
        if any(isinstance(value, int) and value.bit_length() > MAX_INT_BITS for value in values):
            raise TemplateLimitError(f"makes a whole number of over {MAX_INT_BITS} bits")

    def weigh(self, value: object) -> int:
        """About the characters of a value as text, with all that is in it, counted as often as it is in it; or a number over the limit."""
        total, stack = 0, [value]
        while stack and total + CELL * len(stack) <= MAX_BYTES:
            one = stack.pop()
            total += CELL
            if isinstance(one, str):
                total += len(one)
            elif isinstance(one, int):
                total += one.bit_length() // 3
            elif isinstance(one, Mapping | list | tuple):
                if id(one) in self._known:
                    total += self._known[id(one)][1]
                    continue
                stack.extend(one)
                if isinstance(one, Mapping):
                    stack.extend(one.values())
        return total + CELL * len(stack)

    def remember(self, value: object, weight: int) -> None:
        """Keep the weight of a list that may soon be added to."""
        if len(self._known) >= len(self._messages) + MAX_KNOWN:
            self._known = dict(self._messages)
        self._known[id(value)] = (value, weight)

    def allow_product(self, left: object, right: object) -> None:
        """Before ``left * right``."""
        self.allow_int(left, right)
        for value, times in ((left, right), (right, left)):
            if isinstance(value, str | list | tuple) and isinstance(times, int):
                self.allow((len(value) if isinstance(value, str) else self.weigh(value)) * max(times, 0))

    def allow_power(self, left: object, right: object) -> None:
        """Before ``left ** right``."""
        self.allow_int(left, right)
        if isinstance(left, int) and isinstance(right, int) and abs(left) > 1 and abs(right) * left.bit_length() > MAX_INT_BITS:
            raise TemplateLimitError(f"makes a whole number of over {MAX_INT_BITS} bits")

    def allow_percent(self, text: str, values: object) -> None:
        """Before ``text % values``."""
        if _HIDDEN_WIDTH.search(text):
            raise TemplateLimitError("takes the width of a field from a value, or has parentheses in a field's name; neither is allowed")
        self._allow_fields(text, _PERCENT_FIELD.findall(text), values)

    def allow_braces(self, text: str, values: object) -> None:
        """Before ``text.format(...)``."""
        text = text.replace("{{", "").replace("}}", "")
        if re.search(r"\{[^{}]*\{", text):
            raise TemplateLimitError("takes the format of a field from another field, which is not allowed")
        self._allow_fields(text, _BRACE_FIELD.findall(text), values)

    def _allow_fields(self, text: str, fields: list[str], values: object) -> None:
        """Each field may be as wide as all values, or as any number in it says."""
        width = max((int(digits[:20]) for field in fields for digits in _DIGITS.findall(field)), default=0)
        self.allow(len(text) + len(fields) * (width + self.weigh(values)))

    def allow_replace(self, text: object, old: object, new: object) -> None:
        """Before every ``old`` in a text becomes ``new``."""
        text, old, new = str(text), str(old), str(new)
        self.allow(len(text) + (text.count(old) if len(new) > len(old) else 0) * len(new))

    def allow_strip(self, chars: object) -> None:
        """Before ``text.strip(chars)``."""
        if isinstance(chars, str) and len(chars) > MAX_STRIPPED:
            raise TemplateLimitError(f"strips {len(chars)} different characters; at most {MAX_STRIPPED} are allowed")

    def allow_join(self, separator: object, items: list) -> None:
        """Before items become one text."""
        self.allow(self.weigh(items) + len(str(separator)) * len(items))
