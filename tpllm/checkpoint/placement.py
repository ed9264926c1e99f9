"""Arrays made of host buffers that XLA's CPU client takes as they are: no copy, huge pages, memory that goes back when they are freed.

The rows of a matrix come as they are, are quantized and laid out some at a time, and lie where they stay.
"""
import concurrent.futures
import contextlib
import math
import mmap
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from tpllm.checkpoint.read import wait_for_all
from tpllm.weights.layout import Layout
from tpllm.weights.quantize import quantize
from tpllm.weights.scheme import QuantizedRows
from tpllm.weights.weight import Weight

Bounds = tuple[tuple[int, int], ...]
"""(first, one past the last) index of a slice in each dim."""

ALIGNMENT = 64
"""Bytes; XLA's CPU client takes a host buffer as it is where it begins at a multiple of this, and copies it otherwise."""
MAPPED_BYTES = 2**16
CHUNK_BYTES = 2**20
"""How many bytes of rows one thread reads, quantizes and lays out at a time."""
ROW_MULTIPLE = 32
ROWS_AT_ONCE = 1024
"""Of rows that become a plain array."""


def place(shape: tuple[int, ...], sharding: jax.sharding.Sharding, *, dtype: Any, fill: Callable[[Mapping[Bounds, np.ndarray]], None]) -> jax.Array:
    """One array on its devices.

    Args:
        shape, sharding, dtype: of the array.
        fill: writes the values: it is given an empty buffer for every different slice that the local devices hold.
    """
    buffers = _buffers(shape, sharding, np.dtype(dtype))
    fill(buffers)
    return _assemble(shape, sharding, buffers)


def fill_by_rows(buffers: Mapping[Bounds, np.ndarray], read_rows: Callable[[int, int], np.ndarray]) -> None:
    """Fill the slices of an array from its whole rows [first, last), some at a time; for :func:`place`."""
    for (rows, *others), buffer in buffers.items():
        columns = tuple(slice(*other) for other in others)
        for first in range(*rows, ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, rows[1])
            buffer[first - rows[0]:last - rows[0]] = read_rows(first, last)[(slice(None), *columns)]


def place_all(arrays: Mapping[str, tuple[tuple[int, ...], np.dtype, jax.sharding.Sharding]],
              fill: Callable[[Mapping[tuple[int, int], dict[str, np.ndarray]]], None], *, num_shards: tuple[int, int]) -> dict[str, jax.Array]:
    """Several arrays that make one matrix together, cut alike in their first two dims.

    Args:
        arrays: (shape, dtype, sharding) by name.
        fill: writes the values: for each shard of the matrix that the local devices hold it is given the empty buffer of each array. An array
            that is not cut like the others has one buffer for several shards.
        num_shards: into how many parts the matrix is cut.
    """
    buffers = {name: _buffers(shape, sharding, dtype) for name, (shape, dtype, sharding) in arrays.items()}
    shards: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    for name, (shape, _, sharding) in arrays.items():
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            bounds = _bounds(index, shape)
            held = {other: _shard_of(_bounds(places.addressable_devices_indices_map(size)[device], size), size, num_shards)
                    for other, (size, _, places) in arrays.items()}
            shard = tuple(map(max, zip(*held.values(), strict=True)))  # 0 where an array is not cut
            shards.setdefault(shard, {})[name] = buffers[name][bounds]
    fill(shards)
    return {name: _assemble(shape, sharding, buffers[name]) for name, (shape, _, sharding) in arrays.items()}


def make_matrix(layout: Layout, read_rows: Callable[[int, int], np.ndarray | QuantizedRows], pool: concurrent.futures.Executor) -> Weight:
    """One matrix on its devices; the peak of host memory is its own size and a chunk a thread.

    Args:
        layout: how it is kept.
        read_rows: gives stored rows [first, last) of the whole matrix: [last - first, K] in ``layout.source_dtype``, which are quantized here, or
            rows of ``layout.scheme``; called by several threads.
        pool: the threads.
    """
    rows_a_shard = layout.shape[0] // layout.num_shards[0]

    def fill(shards: Mapping[tuple[int, int], dict[str, np.ndarray]]) -> None:
        def store(shard: int, first: int, last: int) -> None:
            rows = read_rows(shard * rows_a_shard + first, shard * rows_a_shard + last)
            if layout.scheme is not None and isinstance(rows, np.ndarray):
                rows = quantize(rows, layout.scheme)
            for (n_shard, k_shard), arrays in shards.items():
                if n_shard == shard:
                    layout.write(rows, first, k_shard, arrays)
        step = max(1, CHUNK_BYTES // max(1, layout.shape[1] * layout.source_dtype.itemsize) // ROW_MULTIPLE) * ROW_MULTIPLE
        tasks = [pool.submit(store, shard, first, min(first + step, rows_a_shard))
                 for shard in sorted({n_shard for n_shard, _ in shards}) for first in range(0, rows_a_shard, step)]
        wait_for_all(tasks)
    described = {name: (shape, dtype, layout.partition.sharding(axes, shape=shape, name=name))
                 for name, (shape, dtype, axes) in layout.arrays().items()}
    return layout.build(place_all(described, fill, num_shards=layout.num_shards))


def _shard_of(bounds: Bounds, shape: tuple[int, ...], num_shards: tuple[int, int]) -> tuple[int, int]:
    return tuple(first * parts // size if size else 0 for (first, _), size, parts in zip(bounds, shape, num_shards, strict=False))


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _buffers(shape: tuple[int, ...], sharding: jax.sharding.Sharding, dtype: np.dtype) -> dict[Bounds, np.ndarray]:
    """An empty buffer for every different slice that the local devices hold."""
    buffers: dict[Bounds, np.ndarray] = {}
    for index in sharding.addressable_devices_indices_map(shape).values():
        bounds = _bounds(index, shape)
        if bounds not in buffers:
            buffers[bounds] = _aligned_empty(tuple(stop - start for start, stop in bounds), dtype)
    return buffers


def _assemble(shape: tuple[int, ...], sharding: jax.sharding.Sharding, buffers: Mapping[Bounds, np.ndarray]) -> jax.Array:
    array = jax.make_array_from_callback(shape, sharding, lambda index: buffers[_bounds(index, shape)])
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
