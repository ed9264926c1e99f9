"""Parameters whose rows are columns of a tensor of all experts: matrices of [E, inputs, columns], biases of [E, columns].

Rows are asked for a few at a time, and columns lie apart in the file, so whole experts are read and the latest ones kept.
"""
import concurrent.futures
import functools
import threading
from collections.abc import Callable

import numpy as np

from tpllm.checkpoint.formats.matrix import FLOATS
from tpllm.checkpoint.read import TensorReader
from tpllm.checkpoint.safetensors import BITS, TensorEntry
from tpllm.checkpoint.stored import RowReader, StoredMatrix
from tpllm.errors import CheckpointError
from tpllm.families.family import Columns
from tpllm.weights.scheme import QuantizedRows

EXPERTS_IN_MEMORY = 4
"""How many experts of one tensor are kept in memory: threads work on neighbouring rows, and so on two experts at most."""


def plain_rows(entry: TensorEntry, shape: tuple[int, ...]) -> StoredMatrix:
    """The columns of a tensor of floats, of all experts one after the other, as rows.

    Args:
        entry: [E, inputs, columns], or [E, columns].
        shape: (experts * columns, inputs), or (experts * columns,).

    Raises:
        CheckpointError: another shape or dtype.
    """
    num_columns = entry.shape[-1] if entry.shape else 0
    is_whole = len(entry.shape) == len(shape) + 1 and entry.shape[0] * num_columns == shape[0] and entry.shape[1:-1] == shape[1:]
    if not is_whole or entry.dtype not in FLOATS:
        raise CheckpointError(f"{entry.path}: tensor {entry.name!r} is {entry.dtype} of shape {entry.shape}; it must be {' or '.join(FLOATS)}, of "
                              f"experts of {shape[0]} columns in all and {shape[1:]} inputs, by config.json's sizes")
    return StoredMatrix((entry.name,), shape, None, BITS[entry.dtype], None, functools.partial(_open, entry), kind=entry.dtype)


def _open(entry: TensorEntry, reader: TensorReader) -> RowReader:
    expert, num_columns = _latest(lambda index: reader.read_raw(entry, index, index + 1)[0]), entry.shape[-1]

    def rows(first: int, last: int) -> np.ndarray:
        parts = []
        while first < last:
            index, begin = divmod(first, num_columns)
            end = min(num_columns, begin + last - first)
            parts.append(expert(index)[..., begin:end].T.astype(np.float32))
            first += end - begin
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
    return rows


def _latest(read: Callable[[int], np.ndarray]) -> Callable[[int], np.ndarray]:
    """``read`` for several threads, which keeps what it gave last; two that ask for one thing read it once."""
    lock, kept = threading.Lock(), {}

    def get(index: int) -> np.ndarray:
        with lock:
            is_first = index not in kept
            found = kept.setdefault(index, concurrent.futures.Future())
            while len(kept) > EXPERTS_IN_MEMORY:
                del kept[next(iter(kept))]
        if is_first:
            try:
                found.set_result(read(index))
            except Exception as error:
                found.set_exception(error)
        return found.result()
    return get


def every_nth(matrix: StoredMatrix, columns: Columns, num_rows: int) -> StoredMatrix:
    """``num_rows`` rows of a matrix whose other rows belong to other parameters."""
    if columns == Columns():
        return matrix

    def open_rows(reader: TensorReader) -> RowReader:
        read = matrix.open(reader)

        def rows(first: int, last: int) -> QuantizedRows | np.ndarray:
            part = read(first * columns.every + columns.first, max(first, last - 1) * columns.every + columns.first + (last > first))
            return part.take(slice(None, None, columns.every)) if isinstance(part, QuantizedRows) else part[::columns.every]
        return rows
    return StoredMatrix(matrix.names, (num_rows, *matrix.shape[1:]), matrix.scheme, matrix.bits_per_weight, matrix.order, open_rows, kind=matrix.kind)
