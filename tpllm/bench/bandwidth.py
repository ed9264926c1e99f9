"""How fast memory is read here: the ceiling of decoding, where every step reads all weights.

The host's memory is read by a process of its own (this file, run as a script), so that the buffer counts neither in the peak memory of
the model nor in what is free for it.
"""
import concurrent.futures
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np

BUFFER_BYTES = 2 * 10**9
NUM_PASSES = 5


@dataclasses.dataclass(frozen=True)
class Bandwidth:
    """Samples of a read bandwidth, bytes per second."""

    samples: tuple[float, ...]

    @property
    def best(self) -> float:
        """The fastest pass."""
        return max(self.samples)

    @property
    def median(self) -> float:
        """The middle pass."""
        return statistics.median(self.samples)

    def __add__(self, other: "Bandwidth") -> "Bandwidth":
        return Bandwidth(self.samples + other.samples)


def host_bandwidth(free_bytes: int, *, num_passes: int = NUM_PASSES) -> Bandwidth:
    """Read an anonymous float32 buffer of 2 GB (a quarter of ``free_bytes`` where that is less), one thread a core.

    Args:
        free_bytes: of the host's memory.
        num_passes: samples to take.
    """
    num_bytes = min(BUFFER_BYTES, free_bytes // 4)
    words = [sys.executable, "-P", __file__, str(num_bytes), str(os.cpu_count()), str(num_passes)]
    return Bandwidth(tuple(json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)))


def read_passes(num_bytes: int, num_threads: int, num_passes: int) -> list[float]:
    """Bytes per second of each pass over a fresh float32 buffer.

    A maximum reads what a sum reads, in fewer instructions: numpy's sum is bound by them on one core, its maximum by memory. numpy lets
    the other threads run meanwhile.
    """
    buffer = np.ones(num_bytes // 4, np.float32)  # written, so that every page is its own
    parts = np.array_split(buffer, num_threads)
    with concurrent.futures.ThreadPoolExecutor(num_threads) as threads:
        def read_once() -> float:
            start = time.perf_counter()
            list(threads.map(np.maximum.reduce, parts))
            return buffer.nbytes / (time.perf_counter() - start)
        read_once()
        return [read_once() for _ in range(num_passes)]


def device_bandwidth(devices: Sequence, *, num_passes: int = NUM_PASSES, num_bytes: int = BUFFER_BYTES) -> Bandwidth:
    """Sum a float32 buffer in the memory of each device, all at once; the total of the devices.

    Args:
        devices: JAX devices of this process.
        num_passes: samples to take.
        num_bytes: of the buffer on each device.
    """
    import jax
    import jax.numpy as jnp
    buffers = [jax.device_put(jnp.ones(num_bytes // 4, jnp.float32), device) for device in devices]
    total = jax.jit(jnp.sum)

    def read_once() -> float:
        start = time.perf_counter()
        jax.block_until_ready([total(buffer) for buffer in buffers])
        return sum(buffer.nbytes for buffer in buffers) / (time.perf_counter() - start)
    read_once()
    return Bandwidth(tuple(read_once() for _ in range(num_passes)))


if __name__ == "__main__":
    print(json.dumps(read_passes(*map(int, sys.argv[1:]))))
