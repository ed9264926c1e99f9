"""Arrays made of host buffers that XLA's CPU client takes as they are: no copy, huge pages, memory that goes back when they are freed."""
import contextlib
import math
import mmap
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Bounds = tuple[tuple[int, int], ...]
"""(first, one past the last) index of a slice in each dim."""

ALIGNMENT = 64
"""Bytes; XLA's CPU client takes a host buffer as it is where it begins at a multiple of this, and copies it otherwise."""
MAPPED_BYTES = 2**16


def place(shape: tuple[int, ...], sharding: jax.sharding.Sharding, *, dtype: Any, fill: Callable[[Mapping[Bounds, np.ndarray]], None]) -> jax.Array:
    """One array on its devices.

    Args:
        shape, sharding, dtype: of the array.
        fill: writes the values: it is given an empty buffer for every different slice that the local devices hold.
    """
    def bounds_of(index: tuple[slice, ...]) -> Bounds:
        return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))

    buffers: dict[Bounds, np.ndarray] = {}
    for index in sharding.addressable_devices_indices_map(shape).values():
        bounds = bounds_of(index)
        if bounds not in buffers:
            buffers[bounds] = _aligned_empty(tuple(stop - start for start, stop in bounds), np.dtype(dtype))
    fill(buffers)
    array = jax.make_array_from_callback(shape, sharding, lambda index: buffers[bounds_of(index)])
    return jax.block_until_ready(array)  # so that the next tensor's buffers do not join this one's


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that XLA can take as it is; large pieces are mapped one by one, so that freeing them gives them back to the system."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes >= MAPPED_BYTES:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages refuses
                memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, dtype).reshape(shape)
    raw = np.empty(num_bytes + ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset:offset + num_bytes].view(dtype).reshape(shape)
