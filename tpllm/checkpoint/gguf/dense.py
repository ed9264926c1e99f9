"""ggml's blocks that no scheme keeps: from the bytes of rows to float32, each step rounded as ggml's own reference (quants.py) rounds it.

The layouts are those of ggml-common.h. Types whose codes point into ggml's tables are left to that reference, the gguf package.
"""
import functools
from collections.abc import Callable

import numpy as np

from tpllm.checkpoint.gguf.blocks import half_at, nibbles

IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
POWERS_OF_3 = np.array([1, 3, 9, 27, 81], np.uint8)


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
"""By the ggml type: from uint8 [n, blocks, bytes of a block] to float32 [n, blocks, ...] in the order of the row."""
