"""ggml's blocks: from the bytes of rows to codes, scales and mins where a scheme keeps them, else to float32.

The layouts are those of ggml-common.h (``block_q4_0`` and so on). Of what is kept only bits are moved. Of the rest each step is rounded as ggml's own
reference (quants.py) rounds it; types whose codes point into ggml's tables are left to that reference, the gguf package.
"""
import functools
from collections.abc import Callable

import numpy as np

from tpllm.weights.quantize import MXFP4
from tpllm.weights.scheme import QuantizedRows, Scheme

FLOAT16 = np.dtype(np.float16)
_LOW, _TWO = np.uint8(15), np.uint8(3)
SUPER = 256
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
POWERS_OF_3 = np.array([1, 3, 9, 27, 81], np.uint8)


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
"""For each ggml type the scheme, and the function from uint8 [n, blocks, bytes of a block] to rows of it."""


def _scale(blocks: np.ndarray, start: int) -> np.ndarray:
    return half_at(blocks, start).astype(np.float32)[..., None]


def _crumbs(packed: np.ndarray) -> np.ndarray:
    """[n, blocks, halves, 4, 32] codes of two bits: 32 bytes hold four lines of them."""
    parts = packed.reshape(*packed.shape[:2], -1, 1, 32)
    return parts >> np.array([0, 2, 4, 6], np.uint8)[:, None] & np.uint8(3)


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    small = blocks[..., :16]
    scales, mins = _scale(blocks, 80) * (small & 15).astype(np.float32), _scale(blocks, 82) * (small >> 4).astype(np.float32)
    codes = _crumbs(blocks[..., 16:80]).reshape(*blocks.shape[:2], 16, 16)
    return scales[..., None] * codes.astype(np.float32) - mins[..., None]


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    packed = blocks[..., 96:108]
    low = nibbles(packed[..., :8]).reshape(*blocks.shape[:2], 16)
    high = packed[..., None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & np.uint8(3)
    scales = (low | high.reshape(low.shape) << 4).astype(np.float32) - np.float32(32)
    is_high = blocks[..., None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    codes = _crumbs(blocks[..., 32:96]).reshape(is_high.shape).astype(np.int8) - (4 - 4 * is_high.astype(np.int8))
    spread = (_scale(blocks, 108) * scales)[..., None]
    return spread * codes.reshape(*blocks.shape[:2], 16, 16).astype(np.float32)


def _iq4_nl(blocks: np.ndarray) -> np.ndarray:
    return _scale(blocks, 0) * IQ4_VALUES[nibbles(blocks[..., 2:])].reshape(*blocks.shape[:2], 32)


def _iq4_xs(blocks: np.ndarray) -> np.ndarray:
    high = np.ascontiguousarray(blocks[..., 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4], axis=-1).reshape(high.shape)
    scales = _scale(blocks, 0) * ((low | high << 4).astype(np.float32) - np.float32(32))
    codes = nibbles(blocks[..., 8:].reshape(blocks.shape[0], -1, 16)).reshape(*blocks.shape[:2], 8, 32)
    return scales[..., None] * IQ4_VALUES[codes]


def _trits(packed: np.ndarray, count: int) -> np.ndarray:
    """[n, blocks, count x bytes] of -1, 0, 1: a byte is the fraction of 256 whose digits to base 3 they are, the first ones in all bytes first."""
    shifted = packed[..., None, :] * POWERS_OF_3[:count, None]
    return ((shifted.astype(np.uint16) * 3 >> 8).astype(np.float32) - np.float32(1)).reshape(*packed.shape[:2], -1)


def _tq1_0(blocks: np.ndarray) -> np.ndarray:
    codes = [_trits(blocks[..., :32], 5), _trits(blocks[..., 32:48], 5), _trits(blocks[..., 48:52], 4)]
    return _scale(blocks, 52) * np.concatenate(codes, axis=-1)


def _tq2_0(blocks: np.ndarray) -> np.ndarray:
    return _scale(blocks, 64) * (_crumbs(blocks[..., :64]).reshape(*blocks.shape[:2], 256).astype(np.float32) - np.float32(1))


def _q8_k(blocks: np.ndarray) -> np.ndarray:
    """Sums of the codes follow, which only products need."""
    scales = np.ascontiguousarray(blocks[..., :4]).view("<f4")
    return scales * np.ascontiguousarray(blocks[..., 4:260]).view(np.int8).astype(np.float32)


def _by_gguf(name: str, blocks: np.ndarray) -> np.ndarray:
    import gguf  # imported here: it takes 0.1 s, and few files need it
    return gguf.quants.dequantize(blocks.reshape(blocks.shape[0], -1), gguf.GGMLQuantizationType[name])


def has_gguf() -> bool:
    """Whether the gguf package is there, in a version that knows all of :data:`OF_GGUF`."""
    try:
        import gguf
        return all(name in gguf.GGMLQuantizationType.__members__ for name in OF_GGUF)
    except ImportError:
        return False


OF_GGUF = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "NVFP4")
"""Read by the gguf package."""
DENSE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q8_K": _q8_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "TQ1_0": _tq1_0, "TQ2_0": _tq2_0,
    **{name: functools.partial(_by_gguf, name) for name in OF_GGUF},
}
"""For each ggml type the function from uint8 [n, blocks, bytes of a block] to float32 [n, blocks, ...] in the order of the row."""
