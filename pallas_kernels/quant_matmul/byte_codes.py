"""Codes of 4 to 6 bits in bytes, unpacked by masks alone.

The low four bits lie two codes a byte: in each 128 inputs byte j has input j in its low half, and input j + 64, less 8 and so a signed number, in its
high half. What is above those four bits lies in bytes of its own: byte j of 32 has input j + 32 i at bit 2 i (6 bits, 128 inputs; the last of them
less 2) or at bit i (5 bits, 256 inputs). A masked byte is a signed number, and what it is to be multiplied by goes into the scale.
"""
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 128
HALF = BLOCK // 2
PLANE = 32
"""Bytes that the high bits of a block of codes take."""
Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class CodeSlice:
    """Some neighbouring inputs: code = ``scale * (byte & mask + high_scale * (high byte & high_mask)) + offset``, in which all is exact in bfloat16.

    Attributes:
        first: the first input.
        byte: where their low bits, or all of them, begin.
        mask: of those bits in the signed byte; None for all.
        high_byte, high_mask, high_scale: of the bytes of high bits; None without.
        scale, offset: see above.
    """

    first: int
    byte: int
    mask: int | None = None
    scale: float = 1.0
    offset: int = 0
    high_byte: int | None = None
    high_mask: int = 0
    high_scale: float = 0.0


def slice_width(bits: int, group: int) -> int:
    """Inputs that are unpacked together: their codes come from neighbouring bytes, and they have one scale."""
    return min(BLOCK if bits == 8 else HALF, group or BLOCK, PLANE if bits in (5, 6) else BLOCK)


def slices(bits: int, width: int, num_inputs: int) -> Iterator[CodeSlice]:
    """How the codes of so many inputs, whole blocks, are unpacked, ``width`` at a time and in order."""
    for first in range(0, num_inputs, width):
        yield _slice(first, bits)


def _slice(first: int, bits: int) -> CodeSlice:
    if bits == 8:
        return CodeSlice(first, first)
    block, inside = divmod(first, BLOCK)
    is_high = inside >= HALF
    low = CodeSlice(first, block * HALF + inside % HALF, mask=-16 if is_high else 15, scale=1 / 16 if is_high else 1.0, offset=8 if is_high else 0)
    if bits == 4:
        return low
    high_bits = bits - 4
    block, inside = divmod(first, PLANE * 8 // high_bits)
    place = inside // PLANE * high_bits
    field = (2**high_bits - 1) << place
    is_signed_bit = field == 1 << 7
    return dataclasses.replace(
        low, high_byte=block * PLANE + inside % PLANE, high_mask=field - 256 if field > 127 else field,
        high_scale=(-1 if is_signed_bit else 1) * 16 / 2**place / low.scale, offset=low.offset + (32 if high_bits == 2 and place == 6 else 0))


def pack_bytes(codes_NK: Array, bits: int) -> tuple[Array, Array | None]:
    """int8 (low four bits [N, K / 2], high bits [N, K (bits - 4) / 8] or None) of uint8 codes; K whole blocks."""
    low, high = (half & 15 for half in _parts(codes_NK, HALF, 2))
    packed = (low | ((high ^ 8) << 4)).reshape(len(codes_NK), -1).view(np.int8)
    if bits == 4:
        return packed, None
    planes, high_bits = 0, bits - 4
    for i, part in enumerate(_parts(codes_NK, PLANE, 8 // high_bits)):
        field = part >> 4
        planes = planes | (field ^ 2 if bits == 6 and i == 3 else field) << (i * high_bits)
    return packed, planes.reshape(len(codes_NK), -1).view(np.int8)


def _parts(codes_NK: Array, width: int, count: int) -> list[Array]:
    blocks = codes_NK.reshape(len(codes_NK), -1, count, width)
    return [blocks[:, :, i] for i in range(count)]


def unpack_bytes(codes: Array, high: Array | None, bits: int) -> Array:
    """float32 [N, K] codes of :func:`pack_bytes`."""
    numpy, parts = np if isinstance(codes, np.ndarray) else jnp, []
    width = slice_width(bits, 0)
    for piece in slices(bits, width, 2 * codes.shape[1]):
        value = (codes[:, piece.byte:piece.byte + width] & np.int8(piece.mask)).astype(np.float32)
        if piece.high_byte is not None:
            value = value + (high[:, piece.high_byte:piece.high_byte + width] & np.int8(piece.high_mask)).astype(np.float32) * piece.high_scale
        parts.append(value * piece.scale + piece.offset)
    return numpy.concatenate(parts, axis=1)
