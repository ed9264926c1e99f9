"""Stored elements to the dtype they are computed in, block by block and without holding Python's lock."""
import functools
from collections.abc import Callable

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)
TARGETS = (FLOAT32, BFLOAT16, np.dtype(np.float16))
STORED = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BFLOAT16,
          "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)}
"""The dtypes that hold weights, by the name the file gives them."""


def converter(stored: str, target: np.dtype) -> Callable[[np.ndarray, np.ndarray], None]:
    """A function ``convert(source, out)`` for arrays of one shape.

    Args:
        stored: a key of :data:`STORED`; ``source`` has its dtype.
        target: one of :data:`TARGETS`; ``out`` has it.

    The function raises ``FloatingPointError`` where a finite value lies beyond the range of ``target``.
    """
    source = STORED[stored]
    if source == target:
        return _copy
    if source.itemsize == 1:
        return functools.partial(_look_up, _table(stored, target))
    if source == BFLOAT16 and target == FLOAT32:
        return _widen_bfloat16
    # numpy and ml_dtypes know no direct cast between their two halves; float32 holds both.
    is_direct = FLOAT32 in (source, target)
    return _cast if is_direct else _cast_through_float32


def _copy(source: np.ndarray, out: np.ndarray) -> None:
    unsigned = np.dtype(f"u{source.itemsize}")
    np.copyto(out.view(unsigned), source.view(unsigned))


def _widen_bfloat16(source: np.ndarray, out: np.ndarray) -> None:
    """A bfloat16 is the upper half of a float32."""
    bits = out.view(np.uint32)
    np.copyto(bits, source.view(np.uint16))
    np.left_shift(bits, 16, out=bits)


def _look_up(table: np.ndarray, source: np.ndarray, out: np.ndarray) -> None:
    # mode: without it numpy checks every index and buffers the output.
    np.take(table, source.view(np.uint8), out=out.view(table.dtype), mode="clip")


def _cast(source: np.ndarray, out: np.ndarray) -> None:
    with np.errstate(over="raise", invalid="ignore"):  # a NaN stays one
        np.copyto(out, source, casting="unsafe")


def _cast_through_float32(source: np.ndarray, out: np.ndarray) -> None:
    middle = np.empty(source.shape, np.float32)
    _cast(source, middle)
    _cast(middle, out)


@functools.cache
def _table(stored: str, target: np.dtype) -> np.ndarray:
    """The value of each of the 256 codes, as the unsigned integers that hold its bits."""
    values = np.arange(256, dtype=np.uint8).view(STORED[stored]).astype(np.float32).astype(target)
    return values.view(f"u{target.itemsize}")
