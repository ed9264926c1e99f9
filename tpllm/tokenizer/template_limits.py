"""What a chat template may use up: a template is a program that came with somebody's model, and it runs for each row of a job.

Python can stop a thread neither from outside nor within one call of its own. So all that a template does goes through few doors (calls, filters,
tests, operators, comparisons, slices, output), each with the same rule: what goes in is weighed and may weigh 4 MB, so that a call whose time grows
in proportion takes a fraction of a second; what could grow faster has a bound of its own in :mod:`~tpllm.tokenizer.template_costs`; then the clock
is looked at, and what came out is counted.
"""
import itertools
import sys
import threading
import time
from collections.abc import Mapping

from tpllm.tokenizer.traced_text import is_nobodys, spans_of

MAX_SECONDS = 1.0
"""The most seconds of the thread's own computing time, to render or to compile. What else the machine does must not decide whether a row runs."""
MAX_BYTES = 4_000_000
"""The most characters of the rendered text, and about the most of any value on the way."""
MAX_MADE = 64 * MAX_BYTES
"""Bytes of all values on the way together; those of which a loop makes a text bit by bit count each time."""
MAX_ITEMS = 100_000
"""Elements of a list that is made, and characters of a text whose characters are gone through one by one."""
MAX_INT_BITS = 4096

CELL = 8  # what an element weighs besides its content
KNOWN = 200  # bytes that it takes to remember a weight
_running = threading.local()


class TemplateLimitError(Exception):
    """A limit that a template came to. No ``ValueError``: some of Jinja's filters take those for bad input and go on."""


class Clock:
    """Stops what computes for too long; of the thread that made it."""

    def __init__(self):
        self._cpu_start, self._next_look = time.thread_time(), time.perf_counter() + MAX_SECONDS

    def check_time(self) -> None:
        """Stop a template that computes for too long."""
        now = time.perf_counter()
        if now > self._next_look:
            left = MAX_SECONDS - (time.thread_time() - self._cpu_start)
            if left <= 0:
                raise TemplateLimitError(f"runs for over {MAX_SECONDS:g} s")
            self._next_look = now + left


class Budget(Clock):
    """What one rendering may still use; ``with Budget(): ...`` makes it the thread's :func:`budget`.

    Values that a template gets do not change while it runs, for its sandbox lets none change. So each is weighed once.
    """

    def __init__(self):
        super().__init__()
        self._num_made = 0
        self._known: dict[int, tuple[object, int, bool]] = {}

    def __enter__(self) -> "Budget":
        self._outer = getattr(_running, "budget", None)
        _running.budget = self
        return self

    def __exit__(self, *_) -> None:
        _running.budget = self._outer

    def enter(self, *values: object) -> bool:
        """Stop before a call that is given too much; returns whether a user's text is in it."""
        self.check_time()
        self.allow_items(len(values))
        has_user = False
        for value in values:
            weight, is_user = (len(value), bool(spans_of(value))) if isinstance(value, str) else self.weigh(value)
            self.allow(weight)
            self.allow_int(value)
            has_user = has_user or is_user
        return has_user

    def take(self, value):
        """Count a value that was made; returns it."""
        self.check_time()
        if isinstance(value, str):
            self.allow(len(value))
            return self._count(value, sys.getsizeof(value))
        if isinstance(value, Mapping | list | tuple):
            self.allow_items(len(value))
            self.allow(self.weigh(value)[0])
            return self._count(value, sys.getsizeof(value))  # what is in them was counted when it was made
        self.allow_int(value)
        return value

    def _count(self, value, num_bytes: int):
        self._num_made += num_bytes
        if self._num_made > MAX_MADE:
            raise TemplateLimitError(f"makes values of over {MAX_MADE // 1_000_000} MB together")
        return value

    def take_sum(self, left: list, right: list) -> list:
        """``left + right``, without a look at each element: a list may be added to in a loop."""
        (left_weight, has_left), (right_weight, has_right) = self.weigh(left), self.weigh(right)
        self.allow(left_weight + right_weight)
        made = left + right
        self._known[id(made)] = (made, left_weight + right_weight - CELL, has_left or has_right)
        return self._count(made, sys.getsizeof(made) + KNOWN)

    def allow(self, size: float) -> None:
        """Stop before, or after, a value of this size is made."""
        if size > MAX_BYTES:
            raise TemplateLimitError(f"makes a value of over {MAX_BYTES // 1_000_000} MB")

    def allow_items(self, num_items: int) -> None:
        """Stop before, or after, so many elements are gone through or made."""
        if num_items > MAX_ITEMS:
            raise TemplateLimitError(f"goes through over {MAX_ITEMS} elements at once")

    def allow_int(self, *values: object) -> None:
        """Stop arithmetic with numbers of over a thousand digits: its time grows faster than they do."""
        self.allow_bits(max((value.bit_length() for value in values if isinstance(value, int)), default=0))

    def allow_bits(self, num_bits: int) -> None:
        """Stop before, or after, a whole number of this size is made."""
        if num_bits > MAX_INT_BITS:
            raise TemplateLimitError(f"makes a whole number of over {MAX_INT_BITS} bits")

    def weigh(self, value: object) -> tuple[int, bool]:
        """(about the characters of a value as text, all that is in it counted as often as it is in it; whether a user's text may be among it)."""
        if isinstance(value, str):
            return CELL + len(value), bool(spans_of(value))
        if isinstance(value, int):
            return CELL + value.bit_length() // 3, False
        if not isinstance(value, Mapping | list | tuple):
            return CELL, not is_nobodys(value)
        if id(value) not in self._known:
            weight, is_user = CELL, False
            for item in itertools.chain(value, value.values()) if isinstance(value, Mapping) else value:
                more, has_user = self.weigh(item)
                weight, is_user = weight + more, is_user or has_user
            self._known[id(value)] = (value, weight, is_user)
            self._num_made += KNOWN
        return self._known[id(value)][1:]


def budget() -> Budget:
    """The budget of the rendering that this thread is in."""
    return _running.budget
