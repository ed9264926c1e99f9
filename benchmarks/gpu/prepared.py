"""Sides of contests in a worker: prepared once, then timed in turns with those of other workers."""
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.timing import time_program

MOST_SETS = 32
_PREPARED: dict[str, "Program"] = {}


class Program:
    """A side's program: calls on several sets of inputs, one after the other.

    Args:
        start, wait: see :func:`.time_program`.
        num_calls: of the op in one program.
    """

    def __init__(self, start: Callable[[], Any], wait: Callable[[Any], None], *, num_calls: int):
        self.start, self.wait, self.num_calls = start, wait, num_calls


def num_sets(bytes_per_call: int, target_bytes: int) -> int:
    """How many sets of inputs a program goes through: more than the cache on the chip holds, so that each call finds its own in memory."""
    return min(max(1, -(-target_bytes // max(bytes_per_call, 1))), MOST_SETS)


def keep(key: str, program: Program) -> float:
    """Run a program once and keep it; the seconds of that run, compiling included."""
    began = time.perf_counter()
    program.wait(program.start())
    _PREPARED[key] = program
    return time.perf_counter() - began


def measure(key: str, num_samples: int, sample_s: float) -> list[float]:
    """Samples of the seconds of one call of a kept program."""
    program = _PREPARED[key]
    return [seconds / program.num_calls for seconds in time_program(program.start, program.wait, num_samples=num_samples, sample_s=sample_s)]


def drop() -> None:
    """Let go of every program and its arrays."""
    _PREPARED.clear()
