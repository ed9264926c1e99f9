"""ggml's blocks whose codes are kept as they are: from the bytes of rows to codes, scales and mins.

The layouts are those of ggml-common.h (``block_q4_0`` and so on). Nothing is computed: only bits are moved.
"""
from collections.abc import Callable

import numpy as np

from tpllm.weights.quantize import MXFP4
from tpllm.weights.scheme import QuantizedRows, Scheme

FLOAT16 = np.dtype(np.float16)
_LOW, _TWO = np.uint8(15), np.uint8(3)
SUPER = 256


def half_at(blocks: np.ndarray, start: int) -> np.ndarray:
    """float16 [n, blocks] that stand at a byte of each block."""
    return np.ascontiguousarray(blocks[..., start:start + 2]).view("<f2")[..., 0]


def _lines(parts: np.ndarray) -> np.ndarray:
    return parts.reshape(parts.shape[0], -1)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """[n, blocks, 2, bytes]: the low halves of a block's bytes, then the high ones."""
    codes = np.empty((*packed.shape[:2], 2, packed.shape[2]), np.uint8)
    np.bitwise_and(packed, _LOW, out=codes[:, :, 0])
    np.right_shift(packed, 4, out=codes[:, :, 1])
    return codes


def _with_fifth_bit(codes: np.ndarray, packed: np.ndarray) -> np.ndarray:
    """Bit i of 32 is the fifth of code i."""
    codes |= np.unpackbits(np.ascontiguousarray(packed), axis=-1, bitorder="little").reshape(codes.shape) << 4
    return codes


def _q8_0(blocks: np.ndarray) -> QuantizedRows:
    return QuantizedRows(_lines(blocks[..., 2:]).view(np.int8), half_at(blocks, 0))


def _q4_0(blocks: np.ndarray) -> QuantizedRows:
    return QuantizedRows(_lines(nibbles(blocks[..., 2:])), half_at(blocks, 0))


def _mxfp4(blocks: np.ndarray) -> QuantizedRows:
    """ggml has twice the values and half the scale."""
    return QuantizedRows(_lines(nibbles(blocks[..., 1:])), blocks[..., 0])


def _q4_1(blocks: np.ndarray) -> QuantizedRows:
    return QuantizedRows(_lines(nibbles(blocks[..., 4:])), half_at(blocks, 0), half_at(blocks, 2))


def _q5_0(blocks: np.ndarray) -> QuantizedRows:
    return QuantizedRows(_lines(_with_fifth_bit(nibbles(blocks[..., 6:]), blocks[..., 2:6])), half_at(blocks, 0))


def _q5_1(blocks: np.ndarray) -> QuantizedRows:
    return QuantizedRows(_lines(_with_fifth_bit(nibbles(blocks[..., 8:]), blocks[..., 4:8])), half_at(blocks, 0), half_at(blocks, 2))


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scales, mins), each [n, 8 a block], of 12 bytes: four whole ones of both, whose upper two bits belong to the other four."""
    scales, mins = np.empty((*packed.shape[:2], 8), np.uint8), np.empty((*packed.shape[:2], 8), np.uint8)
    first, second, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales[..., :4], mins[..., :4] = first & 63, second & 63
    scales[..., 4:] = (rest & _LOW) | (first >> 6 << 4)
    mins[..., 4:] = (rest >> 4) | (second >> 6 << 4)
    return _lines(scales), _lines(mins)


def _q4_k(blocks: np.ndarray) -> QuantizedRows:
    chunks = blocks[..., 16:].reshape(blocks.shape[0], -1, 32)
    return QuantizedRows(_lines(nibbles(chunks)), *_six_bits(blocks[..., 4:16]), half_at(blocks, 0), half_at(blocks, 2))


def _q5_k(blocks: np.ndarray) -> QuantizedRows:
    codes = nibbles(blocks[..., 48:].reshape(blocks.shape[0], -1, 32)).reshape(*blocks.shape[:2], 8, 32)
    for group in range(8):
        codes[:, :, group] |= (blocks[..., 16:48] >> group & 1) << 4
    return QuantizedRows(_lines(codes), *_six_bits(blocks[..., 4:16]), half_at(blocks, 0), half_at(blocks, 2))


def _q6_k(blocks: np.ndarray) -> QuantizedRows:
    low = blocks[..., :128].reshape(*blocks.shape[:2], 2, 2, 32)
    high = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 32)
    codes = np.empty((*blocks.shape[:2], 2, 4, 32), np.uint8)
    np.bitwise_and(low, _LOW, out=codes[:, :, :, :2])
    np.right_shift(low, 4, out=codes[:, :, :, 2:])
    for quarter in range(4):
        codes[:, :, :, quarter] |= (high >> (2 * quarter) & _TWO) << 4
    return QuantizedRows(_lines(codes), _lines(blocks[..., 192:208]).view(np.int8), super_scales=half_at(blocks, 208))


KEPT: dict[str, tuple[Scheme, Callable[[np.ndarray], QuantizedRows]]] = {
    "Q8_0": (Scheme("q8_0", 8, 32, scale_dtype=FLOAT16), _q8_0),
    "Q4_0": (Scheme("q4_0", 4, 32, zero=8, scale_dtype=FLOAT16), _q4_0),
    "MXFP4": (MXFP4, _mxfp4),
    "Q4_1": (Scheme("q4_1", 4, 32, mins="float", scale_dtype=FLOAT16), _q4_1),
    "Q5_0": (Scheme("q5_0", 5, 32, zero=16, scale_dtype=FLOAT16), _q5_0),
    "Q5_1": (Scheme("q5_1", 5, 32, mins="float", scale_dtype=FLOAT16), _q5_1),
    "Q4_K": (Scheme("q4_k", 4, 32, mins="super", super_group=SUPER, scale_dtype=np.dtype(np.uint8)), _q4_k),
    "Q5_K": (Scheme("q5_k", 5, 32, mins="super", super_group=SUPER, scale_dtype=np.dtype(np.uint8)), _q5_k),
    "Q6_K": (Scheme("q6_k", 6, 16, zero=32, super_group=SUPER, scale_dtype=np.dtype(np.int8)), _q6_k),
}
"""By the ggml type: the scheme, and the function from uint8 [n, blocks, bytes of a block] to rows of it."""
