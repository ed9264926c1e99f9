"""Timing work that a device does while the host goes on."""
import math
import time
from collections.abc import Callable
from typing import Any

MOST_REPEATS = 2000


def time_program(start: Callable[[], Any], wait: Callable[[Any], None], *, num_samples: int, sample_s: float) -> list[float]:
    """Seconds of one program, some samples.

    A sample starts the program as often as fills ``sample_s``, and then waits once: the device works through them one after the other, and what the
    host does for the next is hidden behind the one before as long as it takes less.

    Args:
        start: begins a program, and gives what to wait for.
        wait: until it is done.
        num_samples: how many.
        sample_s: how long each takes at least.
    """
    wait(start())
    began = time.perf_counter()
    wait(start())
    num_repeats = min(max(1, math.ceil(sample_s / max(time.perf_counter() - began, 1e-9))), MOST_REPEATS)
    samples = []
    for _ in range(num_samples):
        began, last = time.perf_counter(), None
        for _ in range(num_repeats):
            last = start()
        wait(last)
        samples.append((time.perf_counter() - began) / num_repeats)
    return samples
