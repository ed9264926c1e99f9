"""Reading parts of tensors: positioned reads from several threads, straight into the arrays that want them.

Files are read and not mapped: a mapped page can be taken away and read again, at a cost that no one sees (MEASURED: 0.5 to 24 tokens/s).
"""
import concurrent.futures
import contextlib
import dataclasses
import io
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tpllm.checkpoint.convert import STORED, converter
from tpllm.checkpoint.safetensors import TensorEntry, open_regular, read_exactly, read_into
from tpllm.errors import CheckpointError

BLOCK_BYTES = 2**21
"""Read and converted at a time: small enough to stay in a core's cache between the two."""
MAX_THREADS = 8
RAW = STORED | {"U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "I16": np.dtype("<i2"), "U16": np.dtype("<u2"), "I32": np.dtype("<i4"),
                "U32": np.dtype("<u4"), "I64": np.dtype("<i8"), "U64": np.dtype("<u8")}
"""What :meth:`TensorReader.read_raw` reads."""


@dataclasses.dataclass(frozen=True)
class Rectangle:
    """A rectangle of a tensor and where it goes; the tensor counts as a matrix of its first dim by all others.

    Attributes:
        rows, columns: [start, stop) in the tensor.
        out: [rows, columns] in the dtype wanted.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    out: np.ndarray


def wait_for_all(tasks: Sequence[concurrent.futures.Future]) -> None:
    """Wait for tasks of a pool; the first that fails raises here, and those that have not begun never do."""
    try:
        for task in tasks:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


class TensorReader:
    """Reads pieces of tensors with a pool of threads; a context manager that owns the pool and the open files."""

    def __init__(self, num_threads: int | None = None):
        self._num_threads = num_threads or min(MAX_THREADS, os.cpu_count() or 1)
        self._files: dict[Path, io.FileIO] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "TensorReader":
        self.pool = concurrent.futures.ThreadPoolExecutor(self._num_threads, thread_name_prefix="tpllm-load")
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        self._files.clear()

    def read(self, entry: TensorEntry, pieces: Iterable[Rectangle]) -> None:
        """Fill every piece's ``out``. Pieces with the same rows share their reads.

        Raises:
            CheckpointError: a dtype that holds no weights, a value out of the wanted dtype's range, or a file that cannot be read.
        """
        file = self._open_weights(entry)
        groups: dict[tuple[int, int], list[Rectangle]] = {}
        for piece in pieces:
            groups.setdefault(piece.rows, []).append(piece)
        tasks = [self.pool.submit(_read_block, file, entry, block, group)
                 for rows, group in groups.items() for block in _blocks(entry, rows)]
        with self._refusing_overflow(entry, next(iter(groups.values()))[0].out.dtype if groups else None):
            wait_for_all(tasks)

    def read_here(self, entry: TensorEntry, pieces: Iterable[Rectangle]) -> None:
        """As :meth:`read`, by the calling thread; many may call it."""
        file = self._open_weights(entry)
        for piece in pieces:
            with self._refusing_overflow(entry, piece.out.dtype):
                for block in _blocks(entry, piece.rows):
                    _read_block(file, entry, block, [piece])

    def read_raw(self, entry: TensorEntry, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows [first, last) of the first dim as the file has them, read by the calling thread.

        Raises:
            CheckpointError: a dtype of less than a byte, or a file that cannot be read.
        """
        if entry.dtype not in RAW:
            raise CheckpointError(f"{entry.path}: tensor {entry.name!r} is {entry.dtype}; quantized weights are read from {', '.join(RAW)}")
        last = entry.shape[0] if last is None and entry.shape else last
        rows = np.empty((last - first, *entry.shape[1:]) if entry.shape else (), RAW[entry.dtype])
        row_bytes = _num_columns(entry) * rows.dtype.itemsize
        read_into(self._open(entry.path), memoryview(rows.reshape(-1).view(np.uint8)), start=entry.start + first * row_bytes)
        return rows

    def _open_weights(self, entry: TensorEntry) -> io.FileIO:
        if entry.dtype not in STORED:
            raise CheckpointError(f"{entry.path}: tensor {entry.name!r} is {entry.dtype}; weights are read from {', '.join(STORED)}")
        return self._open(entry.path)

    def _open(self, path: Path) -> io.FileIO:
        with self._lock:
            if path not in self._files:
                self._files[path] = open_regular(path)
            return self._files[path]

    @contextlib.contextmanager
    def _refusing_overflow(self, entry: TensorEntry, dtype: np.dtype | None) -> Iterator[None]:
        try:
            yield
        except FloatingPointError:
            raise CheckpointError(f"{entry.path}: tensor {entry.name!r} ({entry.dtype}) holds values beyond the range of {dtype}; "
                                  "load it as bfloat16 or float32") from None


def are_same_bytes(first: TensorEntry, second: TensorEntry) -> bool:
    """Whether two tensors are one in dtype, shape and values; no more is read than up to where they differ.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with open_regular(first.path) as file, open_regular(second.path) as other:
        for begin in range(0, first.num_bytes, BLOCK_BYTES):
            size = min(BLOCK_BYTES, first.num_bytes - begin)
            if read_exactly(file, start=first.start + begin, num_bytes=size) != read_exactly(other, start=second.start + begin, num_bytes=size):
                return False
    return True


def _num_columns(entry: TensorEntry) -> int:
    return math.prod(entry.shape[1:])


def _blocks(entry: TensorEntry, rows: tuple[int, int]) -> Iterator[tuple[int, int]]:
    row_bytes = max(1, _num_columns(entry) * STORED[entry.dtype].itemsize)
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(*rows, step):
        yield start, min(start + step, rows[1])


def _read_block(file: io.FileIO, entry: TensorEntry, block: tuple[int, int], pieces: Sequence[Rectangle]) -> None:
    """Read some rows once and hand each piece its columns."""
    num_columns, stored = _num_columns(entry), STORED[entry.dtype]
    begin = entry.start + block[0] * num_columns * stored.itemsize
    outs = [piece.out[block[0] - piece.rows[0]:block[1] - piece.rows[0]] for piece in pieces]
    is_direct = len(outs) == 1 and outs[0].dtype == stored and pieces[0].columns == (0, num_columns) and outs[0].flags.c_contiguous
    if is_direct:
        read_into(file, memoryview(outs[0].reshape(-1).view(np.uint8)), start=begin)
        return
    raw = np.empty((block[1] - block[0], num_columns), stored)
    read_into(file, memoryview(raw.reshape(-1).view(np.uint8)), start=begin)
    for piece, out in zip(pieces, outs, strict=True):
        converter(entry.dtype, out.dtype)(raw[:, slice(*piece.columns)], out)
