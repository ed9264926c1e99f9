"""Quantized weights as the kernels read them.

A weight of N outputs and K inputs is

    w[n, k] = s[n, k // group] (code[n, k] - zero) + m[n, k // group]

with s and m floats; or small integers times the float16 scales of larger groups, as in llama.cpp's K-quants: s = super_scale scale, m = -super_min min.
Mins of kind ``"zeros"`` are integers too, and m = -s min.

Codes of 8 bits take a byte each, in order. Of smaller ones the low four bits lie two a byte: in each 128 inputs byte j has input j in its low half, and
input j + 64, less 8 and so a signed number, in its high half. What is above those four bits lies in bytes of its own: byte j of 32 has input j + 32 i at
bit 2 i (6 bits, 128 inputs; the last of them less 2) or at bit i (5 bits, 256 inputs). So kernels unpack by masks alone: a masked byte is a signed
number, and what it is to be multiplied by and what is to be added goes into the scale and the min.
"""
import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 128
"""Inputs whose codes lie together; K is padded to so many (5 bits: to twice as many), with scales and mins of 0."""
HALF = BLOCK // 2
PLANE = 32
"""Bytes that the high bits of a block of codes take."""
ROW_TILE = 64
"""What N is padded to: the rows that a warp group multiplies."""
Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """How a weight is quantized and laid out; hashable.

    Attributes:
        bits: of a code: 8, or of integers also 4, 5 and 6.
        kind: what a code is: an integer (signed where it has 8 bits), or fp8 (Micikevicius et al. 2022, arXiv:2209.05433).
        group: inputs that share a scale; 0 where an output has one.
        zero: what is taken from each integer code.
        mins: ``"none"``; ``"float"``: added as they are; ``"zeros"``: integers, the min is ``-scale * zero``; ``"super"``: integers under super mins.
        super_group: inputs that share a scale of scales; 0 for none.
        activations: ``"float"``: multiplied as they are; ``"int8"``: quantized, one scale a row (weights of 8 bit integers with a scale an output);
            ``"e4m3"``: quantized, one scale a row, or a group of 128 where the weights have such groups (e4m3 weights).
        inputs_first: whether arrays lie [K, N], as TPUs like them, and not [N, K].
    """

    bits: int = 8
    kind: Literal["int", "e4m3", "e5m2"] = "int"
    group: int = 0
    zero: int = 0
    mins: Literal["none", "float", "zeros", "super"] = "none"
    super_group: int = 0
    activations: Literal["float", "int8", "e4m3"] = "float"
    inputs_first: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 5, 6, 8) or (self.bits != 8 and self.kind != "int"):
            raise ValueError(f"{self.kind} codes of {self.bits} bits; integers may have 4, 5, 6 or 8, fp8 has 8: widen other codes when packing")
        if self.group not in (0, 16, 32, 64) and self.group % BLOCK:
            raise ValueError(f"groups of {self.group} inputs; they may be of 16, 32, 64 or a multiple of 128, or 0 for one scale an output")
        if self.super_group and (not self.group or self.super_group % self.group):
            raise ValueError(f"super groups of {self.super_group} inputs over groups of {self.group}; they must be a multiple of them")
        if self.mins != "none" and not self.group:
            raise ValueError("mins of whole outputs; mins belong to groups: give a group, repeating what belongs to an output")
        integers = self.kind == "int" and self.bits == 8 and not self.group
        if (self.activations == "int8" and not integers) or (self.activations == "e4m3" and (self.kind != "e4m3" or self.group not in (0, BLOCK))):
            raise ValueError(f"{self.activations} activations times {self.kind} weights of {self.bits} bits in groups of {self.group}; int8 ones go "
                             "with int8 weights of one scale an output, e4m3 ones with e4m3 weights in groups of 128 or of one scale an output")

    @property
    def block(self) -> int:
        """What K is padded to."""
        return max(2 * BLOCK if self.bits == 5 else BLOCK, self.group, self.super_group)

    @property
    def high_bits(self) -> int:
        """Of each code, beside its low four."""
        return self.bits - 4 if self.bits in (5, 6) else 0

    @property
    def slice_width(self) -> int:
        """Inputs that are unpacked together: their codes come from neighbouring bytes, and they have one scale."""
        return min(HALF, self.group or HALF, PLANE if self.high_bits else HALF)

    def num_inputs(self, codes: Array) -> int:
        """K, padded, of packed codes."""
        return codes.shape[0 if self.inputs_first else 1] * (1 if self.bits == 8 else 2)

    def num_outputs(self, codes: Array) -> int:
        """N, padded, of packed codes."""
        return codes.shape[1 if self.inputs_first else 0]

    def slices(self, num_inputs: int) -> Iterator["CodeSlice"]:
        """How the codes of so many inputs, whole blocks from a block's beginning, are unpacked, in order."""
        for first in range(0, num_inputs, self.slice_width):
            yield self._slice(first)

    def _slice(self, first: int) -> "CodeSlice":
        if self.bits == 8:
            return CodeSlice(first, first)
        block, inside = divmod(first, BLOCK)
        is_high = inside >= HALF
        low = CodeSlice(first, block * HALF + inside % HALF, mask=-16 if is_high else 15, scale=1 / 16 if is_high else 1.0, offset=8 if is_high else 0)
        if not self.high_bits:
            return low
        block, inside = divmod(first, PLANE * 8 // self.high_bits)
        place = inside // PLANE * self.high_bits
        field = (2**self.high_bits - 1) << place
        sign = -1 if self.bits == 5 and place == 7 else 1
        return dataclasses.replace(
            low, high_first=block * PLANE + inside % PLANE, high_mask=field - 256 if field > 127 else field, high_scale=sign * 16 / 2**place / low.scale,
            offset=low.offset + (32 if self.bits == 6 and place == 6 else 0))


@dataclasses.dataclass(frozen=True)
class CodeSlice:
    """Some neighbouring inputs: code = ``scale * (byte & mask + high_scale * (high byte & high_mask)) + offset``, in which all is exact in bfloat16.

    Attributes:
        first: the first input.
        byte: where their low bits, or all of them, begin.
        mask: of those bits in the signed byte; None for all.
        high_first, high_mask, high_scale: of the bytes of high bits; None without.
        scale, offset: see above.
    """

    first: int
    byte: int
    mask: int | None = None
    scale: float = 1.0
    offset: int = 0
    high_first: int | None = None
    high_mask: int = 0
    high_scale: float = 0.0


class PackedArrays(NamedTuple):
    """The arrays of a packed weight; one that is not there is None. Where ``inputs_first``, codes and high bits are transposed.

    Attributes:
        codes: [N, bytes]: int8, or fp8.
        high: int8 [N, bytes]: what codes of 5 and 6 bits have above four.
        scales, mins: [groups, N], or [1, N] where an output has one scale.
        super_scales, super_mins: [super groups, N].
    """

    codes: Array
    high: Array | None
    scales: Array
    mins: Array | None = None
    super_scales: Array | None = None
    super_mins: Array | None = None


def pack(weight_format: WeightFormat, codes_NK: Array, scales: Array | None = None, mins: Array | None = None, super_scales: Array | None = None,
         super_mins: Array | None = None) -> PackedArrays:
    """Pack a weight, or a shard of one; in numpy or, traced or not, in jax.

    Args:
        weight_format: what the arrays are.
        codes_NK: codes, each an element: int8, or for fewer bits any integers from 0; or fp8.
        scales, mins: [N, groups], or scales [N] or [N, 1] where an output has one, or None for 1.
        super_scales, super_mins: [N, super groups].

    Returns:
        The arrays, N padded to a multiple of 64 and K to one of ``weight_format.block`` (a padded input adds nothing).
    """
    numpy = np if isinstance(codes_NK, np.ndarray) else jnp
    (N, K), f = codes_NK.shape, weight_format
    rows, columns = -N % ROW_TILE, -K % f.block

    def groups_first(values: Array | None, group: int) -> Array | None:
        if values is None:
            return None
        values = values.reshape(N, -1)
        num_groups = (K + columns) // group if group else 1
        return numpy.pad(values, ((0, rows), (0, num_groups - values.shape[1]))).T
    scales = numpy.ones((N, 1), np.float32) if scales is None else scales
    if f.bits == 8:
        packed, high = numpy.pad(codes_NK, ((0, rows), (0, columns))), None
    else:
        codes = numpy.pad(codes_NK.astype(np.uint8), ((0, rows), (0, columns)))
        packed, high = _pack_low(codes), _pack_high(codes, f.high_bits) if f.high_bits else None
    if f.inputs_first:
        packed, high = packed.T, None if high is None else high.T
    return PackedArrays(packed, high, groups_first(scales, f.group), groups_first(mins, f.group), groups_first(super_scales, f.super_group),
                        groups_first(super_mins, f.super_group))


def _pack_low(codes_NK: Array) -> Array:
    low, high = ((half & 15) for half in _parts(codes_NK, HALF, 2))
    return (low | ((high ^ 8) << 4)).reshape(len(codes_NK), -1).view(np.int8)


def _pack_high(codes_NK: Array, bits: int) -> Array:
    packed = None
    parts = _parts(codes_NK, PLANE, 8 // bits)
    for i, part in enumerate(parts):
        field = part >> 4
        field = (field ^ 2 if bits == 2 and i == len(parts) - 1 else field) << (i * bits)
        packed = field if packed is None else packed | field
    return packed.reshape(len(codes_NK), -1).view(np.int8)


def _parts(codes_NK: Array, width: int, count: int) -> list[Array]:
    blocks = codes_NK.reshape(len(codes_NK), -1, count, width)
    return [blocks[:, :, i] for i in range(count)]


def unpack_codes(weight_format: WeightFormat, codes: Array, high: Array | None) -> Array:
    """[N, K] float32 codes of packed ones, padding included."""
    f = weight_format
    if f.inputs_first:
        codes, high = codes.T, None if high is None else high.T
    if f.bits == 8:
        return codes.astype(np.float32)
    numpy = np if isinstance(codes, np.ndarray) else jnp
    parts = []
    for piece in f.slices(f.num_inputs(codes) if not f.inputs_first else 2 * codes.shape[1]):
        value = (codes[:, piece.byte:piece.byte + f.slice_width] & np.int8(piece.mask)).astype(np.float32)
        if piece.high_first is not None:
            value += (high[:, piece.high_first:piece.high_first + f.slice_width] & np.int8(piece.high_mask)).astype(np.float32) * piece.high_scale
        parts.append(value * piece.scale + piece.offset)
    return numpy.concatenate(parts, axis=1)


def group_scales(weight_format: WeightFormat, arrays: PackedArrays) -> tuple[jax.Array, jax.Array | None]:
    """float32 (scales s, mins m or None) [groups, N] of the formula above."""
    f = weight_format

    def times_super(values: jax.Array, supers: jax.Array | None) -> jax.Array:
        values = values.astype(jnp.float32)
        return values if supers is None else values * jnp.repeat(supers.astype(jnp.float32), f.super_group // f.group, axis=0)
    scales = times_super(arrays.scales, arrays.super_scales)
    if f.mins == "none":
        return scales, None
    mins = times_super(arrays.mins, arrays.super_mins)
    return scales, {"float": mins, "zeros": -scales * mins, "super": -mins}[f.mins]


def dequantize_packed(weight_format: WeightFormat, arrays: PackedArrays) -> jax.Array:
    """float32 [N, K] of packed arrays, padding included."""
    f = weight_format
    scales, mins = (None if x is None else (jnp.repeat(x, f.group, axis=0) if f.group else x).T for x in group_scales(f, arrays))
    weight = scales * (unpack_codes(f, arrays.codes, arrays.high) - f.zero)
    return weight if mins is None else weight + mins
