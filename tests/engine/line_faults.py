"""Faults on purpose at lines of code: something happens just before one of them runs, or in the middle of it."""
import collections
import pathlib
import random
import sys
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, ModuleType
from typing import Any

Place = tuple[str, int, int]
"""A file, a line of it, and the how manieth of its events."""


class LineFaults:
    """Watches the lines of some modules.

    Args:
        modules: whose lines count.
        is_fine: whether each instruction of a line is an event, not only its beginning.
        in_threads: whether the threads are watched that begin during a run, and not the one that runs.

    Attributes:
        num_events: for each line, in the last run.
    """

    def __init__(self, *modules: ModuleType, is_fine: bool = False, in_threads: bool = False):
        self._files, self._is_fine = {module.__file__ for module in modules}, is_fine
        self._set_trace = threading.settrace if in_threads else sys.settrace
        self.num_events: collections.Counter[tuple[str, int]] = collections.Counter()

    def run(self, function: Callable[[], Any], place: Place | None = None, act: Callable[[], None] | None = None) -> Any:
        """What a function gives; at a place ``act`` is called, and what it raises comes from there."""
        self.num_events.clear()
        is_watched: dict[CodeType, bool] = {}

        def begin(frame: FrameType, _event: str, _) -> Callable | None:
            code = frame.f_code
            if code not in is_watched:
                is_watched[code] = code.co_filename in self._files if place is None else (
                    code.co_filename == place[0] and any(line == place[1] for _, _, line in code.co_lines()))
            if not is_watched[code]:
                return None
            frame.f_trace_opcodes = self._is_fine
            return go_on

        def go_on(frame: FrameType, event: str, _) -> Callable:
            if event in ("line", "opcode") and frame.f_lineno is not None:
                at = frame.f_code.co_filename, frame.f_lineno
                self.num_events[at] += 1
                if place == (*at, self.num_events[at]):
                    act()
            return go_on
        self._set_trace(begin)
        try:
            return function()
        finally:
            self._set_trace(None)

    def choose(self, part: float, *, num_each: int = 1, seed: int = 0) -> Iterator[Place]:
        """A part of the lines that the last run passed, each at so many of the times it ran."""
        rng = random.Random(seed)
        for (file, line), most in sorted(self.num_events.items()):
            if rng.random() < part:
                for number in rng.sample(range(1, most + 1), min(num_each, most)):
                    yield file, line, number


def code_at(place: Place) -> str:
    """The line."""
    return pathlib.Path(place[0]).read_text("utf-8").splitlines()[place[1] - 1].strip()


def name_of(place: Place) -> str:
    """A place as text."""
    return f"{pathlib.Path(place[0]).name}:{place[1]}, event {place[2]}: {code_at(place)}"
