"""Making a matrix in the form it is kept in: rows come as they are, are quantized and laid out some at a time, and lie where they stay."""
import concurrent.futures
from collections.abc import Callable, Mapping

import numpy as np

from tpllm.checkpoint.placement import place_all
from tpllm.checkpoint.read import wait_for_all
from tpllm.weights.layout import Layout
from tpllm.weights.quantize import quantize
from tpllm.weights.scheme import QuantizedRows
from tpllm.weights.weight import Weight

CHUNK_BYTES = 2**20
"""Of the rows that one thread reads, quantizes and lays out at a time."""
ROW_MULTIPLE = 32


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
