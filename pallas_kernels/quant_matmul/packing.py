"""Quantized weights as the kernels read them.

A weight of N outputs and K inputs is

    w[n, k] = s[n, k // group] (code[n, k] - zero) + m[n, k // group]

with s and m floats; or small integers times the float16 scales of larger groups, as in llama.cpp's K-quants: s = super_scale scale and
m = -super_min min.
Mins of kind ``"zeros"`` are integers too, and m = -s min.
"""
import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quant_matmul.byte_codes import BLOCK, pack_bytes, unpack_bytes
from pallas_kernels.quant_matmul.fragment_codes import pack_fragments, unpack_fragments
from pallas_kernels.tiling import Device

OUTPUT_TILE = 128
"""What N is padded to: two warp groups of a GPU, or the width of a TPU's registers."""
LARGEST_GROUP = 256
Array = jax.Array | np.ndarray
Layout = Literal["rows", "columns", "fragments"]


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
        layout: ``"rows"``: [N, bytes], see :mod:`.byte_codes`; ``"columns"``: the same transposed, for TPUs; ``"fragments"``: codes of fewer than 8
            bits as in :mod:`.fragment_codes`, for Hopper GPUs.
    """

    bits: int = 8
    kind: Literal["int", "e4m3", "e5m2"] = "int"
    group: int = 0
    zero: int = 0
    mins: Literal["none", "float", "zeros", "super"] = "none"
    super_group: int = 0
    activations: Literal["float", "int8", "e4m3"] = "float"
    layout: Layout = "rows"

    def __post_init__(self) -> None:
        if self.bits not in (4, 5, 6, 8) or (self.bits != 8 and self.kind != "int"):
            raise ValueError(f"{self.kind} codes of {self.bits} bits; integers may have 4, 5, 6 or 8, fp8 has 8: widen other codes before packing")
        if self.group not in (0, 16, 32, 64, 128, LARGEST_GROUP):
            raise ValueError(f"groups of {self.group} inputs; they may be of 16, 32, 64, 128 or 256, or 0 for one scale an output: repeat the scales "
                             "of other ones for smaller groups")
        if self.super_group and (not self.group or self.super_group % self.group or LARGEST_GROUP % self.super_group):
            raise ValueError(f"super groups of {self.super_group} inputs over groups of {self.group}; they must be their multiple and divide 256")
        if (self.mins != "none" and not self.group) or (self.mins == "super" and not self.super_group):
            raise ValueError(f"{self.mins} mins with groups of {self.group} and super groups of {self.super_group}; mins belong to groups, super "
                             "ones to super groups")
        integers = self.kind == "int" and self.bits == 8 and not self.group
        if (self.activations == "int8" and not integers) or (self.activations == "e4m3" and (self.kind != "e4m3" or self.group not in (0, BLOCK))):
            raise ValueError(f"{self.activations} activations times {self.kind} weights of {self.bits} bits in groups of {self.group}; int8 ones go "
                             "with int8 weights of one scale an output, e4m3 ones with e4m3 weights in groups of 128 or of one scale an output")

    @property
    def block(self) -> int:
        """What K is padded to, with codes, scales and mins of 0."""
        return max(2 * BLOCK if self.bits == 5 else BLOCK, self.group, self.super_group)

    def shape(self, codes: Array) -> tuple[int, int]:
        """(N, K), padded, of packed codes."""
        N, K = codes.shape[::-1] if self.layout == "columns" else codes.shape
        return N, K if self.bits == 8 else K * 8 if self.layout == "fragments" else K * 2


class PackedArrays(NamedTuple):
    """The arrays of a packed weight; one that is not there is None. Layout ``"columns"`` has codes and high bits transposed.

    Attributes:
        codes: int8, int32 or fp8 [N, ...].
        high: of the dtype of codes [N, ...]: what codes of 5 and 6 bits have above four.
        scales, mins: [groups, N], or [1, N] where an output has one scale.
        super_scales, super_mins: [super groups, N].
    """

    codes: Array
    high: Array | None
    scales: Array
    mins: Array | None = None
    super_scales: Array | None = None
    super_mins: Array | None = None


def layout_for(device: Device) -> Layout:
    """The layout that this device's kernels read."""
    return "columns" if device.platform == "tpu" else "fragments" if device.has_mosaic_gpu else "rows"


def pack(weight_format: WeightFormat, codes_NK: Array, scales: Array | None = None, mins: Array | None = None, super_scales: Array | None = None,
         super_mins: Array | None = None) -> PackedArrays:
    """Pack a weight, or a shard of one; in numpy, or in jax, traced or not.

    Args:
        weight_format: what the arrays are, and the layout to pack them to.
        codes_NK: codes, each an element: int8, or for fewer bits any integers from 0; or fp8.
        scales, mins: [N, groups], or scales [N] or [N, 1] where an output has one, or None for 1.
        super_scales, super_mins: [N, super groups].

    Returns:
        The arrays, N padded to a multiple of 128 and K to one of ``weight_format.block``. 8-bit codes of a shape that needs no
        padding are returned as they are, or transposed.
    """
    numpy = np if isinstance(codes_NK, np.ndarray) else jnp
    (N, K), f, high = codes_NK.shape, weight_format, None
    rows, columns = -N % OUTPUT_TILE, -K % f.block

    def groups_first(values: Array | None, group: int) -> Array | None:
        if values is None:
            return None
        values = values.reshape(N, -1)
        num_groups = (K + columns) // group if group else 1
        return numpy.pad(values, ((0, rows), (0, num_groups - values.shape[1]))).T
    scales = numpy.ones((N, 1), np.float32) if scales is None else scales
    codes = codes_NK if f.bits == 8 else codes_NK.astype(np.uint8)
    codes = numpy.pad(codes, ((0, rows), (0, columns))) if rows or columns else codes
    if f.bits != 8:
        codes, high = pack_fragments(codes, f.bits) if f.layout == "fragments" else pack_bytes(codes, f.bits)
    if f.layout == "columns":
        codes, high = codes.T, None if high is None else high.T
    return PackedArrays(codes, high, groups_first(scales, f.group), groups_first(mins, f.group), groups_first(super_scales, f.super_group),
                        groups_first(super_mins, f.super_group))


def unpack_codes(weight_format: WeightFormat, arrays: PackedArrays) -> Array:
    """float32 [N, K], padding included."""
    f, codes, high = weight_format, arrays.codes, arrays.high
    if f.layout == "columns":
        codes, high = codes.T, None if high is None else high.T
    if f.bits == 8:
        return codes.astype(np.float32)
    return unpack_fragments(codes, high, f.bits).astype(np.float32) if f.layout == "fragments" else unpack_bytes(codes, high, f.bits)


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
    """float32 [N, K], padding included."""
    f = weight_format
    scales, mins = (None if x is None else (jnp.repeat(x, f.group, axis=0) if f.group else x).T for x in group_scales(f, arrays))
    weight = scales * (unpack_codes(f, arrays) - f.zero)
    return weight if mins is None else weight + mins
