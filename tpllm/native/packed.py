"""Weights packed for the native kernels: the layout of csrc/kernels.h, made once at load, block by block."""
import dataclasses
import enum
from typing import Any

import jax
import numpy as np
from flax import struct

from sharding_rules import ONE_DEVICE, Partition
from tpllm.native.library import load_library

BLOCK = 32
"""Outputs of a block, and inputs of a unit."""


class Format(enum.IntEnum):
    """What a code is; the numbers are those of csrc/kernels.h."""

    F32 = 0
    F16 = 1
    BF16 = 2
    I8 = 3
    E4M3 = 4
    E5M2 = 5
    I4 = 6
    Q5 = 7
    Q6 = 8
    Q2 = 9
    Q3 = 10
    E2M1 = 11


UNIT_BYTES = {Format.F32: 4096, Format.F16: 2048, Format.BF16: 2048, Format.I8: 1024, Format.E4M3: 1024, Format.E5M2: 1024, Format.I4: 512,
              Format.Q5: 640, Format.Q6: 768, Format.Q2: 256, Format.Q3: 384, Format.E2M1: 512}
ITEM_BYTES = {Format.F32: 4, Format.F16: 2, Format.BF16: 2}
DENSE = {np.dtype(np.float32): Format.F32, np.dtype(np.float16): Format.F16, np.dtype(jax.numpy.bfloat16): Format.BF16}


GROUPS = {Format.F32: (0,), Format.F16: (0,), Format.BF16: (0,), Format.Q2: (32, 64, 128, 256), Format.Q3: (32, 64, 128, 256),
          Format.Q5: (32, 64, 128, 256), Format.Q6: (16, 32, 64, 128, 256), Format.E2M1: (16, 32)}
"""Those that a format has kernels for; of the others 0 and 32 to 256."""


def groups_of(code_format: Format) -> tuple[int, ...]:
    """The groups that a format has kernels for; 0 where an output may have one scale."""
    return GROUPS.get(code_format, (0, 32, 64, 128, 256))


@dataclasses.dataclass(frozen=True)
class PackedLayout:
    """What the arrays of a :class:`PackedWeight` mean; hashable.

    A weight is ``w[n, k] = scale * (code - zero) + min``, with scale and min of k's group, or of the output where ``group`` is 0.

    Attributes:
        format: of the codes.
        shape: (N, K) of the whole matrix.
        axes: the logical axes of N and K.
        partition: mesh and rules.
        group: inputs that share a scale: 16, 32, 64, 128 or 256; 0 where an output has one.
        super_group: inputs that share a scale of scales; 0 for none.
        zero: what is taken from each integer code; of I8, whose codes are signed, 1 says that -128 may occur.
        quantizes_input: activations become int8, one scale a row; of I8 with one scale an output only.
        num_outliers: how many inputs of a row are to be multiplied as they are by the caller; kernels take no notice.

    Raises:
        ValueError: there is no kernel for this.
    """

    format: Format
    shape: tuple[int, int]
    axes: tuple[str | None, str | None] = (None, None)
    partition: Partition = ONE_DEVICE
    group: int = 0
    super_group: int = 0
    zero: int = 0
    quantizes_input: bool = False
    num_outliers: int = 0

    def __post_init__(self) -> None:
        groups = groups_of(self.format)
        if self.group not in groups:
            raise ValueError(f"{self.format.name} codes in groups of {self.group}; groups may be {', '.join(map(str, groups))}, where 0 is one "
                             "scale an output")
        ratio = self.super_group // self.group if self.group else 0
        if self.super_group and (ratio < 1 or ratio & (ratio - 1) or ratio * self.group != self.super_group):
            raise ValueError(f"super groups of {self.super_group} and groups of {self.group}; one must be a power of two times the other")
        if self.quantizes_input and (self.format != Format.I8 or self.group):
            raise ValueError(f"{self.format.name} codes in groups of {self.group} times int8 activations; there only I8 with one scale an output")

    @property
    def num_shards(self) -> tuple[int, int]:
        """Into how many parts N and K are cut."""
        return tuple(map(self.partition.size, self.axes))

    @property
    def shard_shape(self) -> tuple[int, int]:
        """(N, K) of one shard."""
        return tuple(size // parts for size, parts in zip(self.shape, self.num_shards, strict=True))

    @property
    def shard_blocks(self) -> int:
        """Blocks of a shard."""
        return -(-self.shard_shape[0] // BLOCK)

    @property
    def shard_units(self) -> int:
        """Units of a shard's block."""
        return -(-self.shard_shape[1] // BLOCK)

    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array: shard after shard."""
        blocks, units = (parts * count for parts, count in zip(self.num_shards, (self.shard_blocks, self.shard_units), strict=True))
        groups = units * BLOCK // self.group if self.group else 0
        scales = (blocks, groups, BLOCK) if self.group else (blocks, BLOCK)
        supers = (blocks, self.num_shards[1] * -(-self.shard_units * BLOCK // self.super_group), BLOCK) if self.super_group else ()
        return {"codes": (blocks, units, UNIT_BYTES[self.format]), "scales": scales, "mins": scales, "super_scales": supers, "super_mins": supers}

    def array_axes(self, name: str) -> tuple[str | None, ...]:
        """The logical axes of an array."""
        n_axis, k_axis = self.axes
        return (n_axis, None) if name in ("scales", "mins") and not self.group else (n_axis, k_axis, None)


@struct.dataclass
class PackedWeight:
    """One matrix as the native kernels read it.

    Attributes:
        codes: uint8 [blocks, units, bytes].
        scales, mins: [blocks, groups, 32], or [blocks, 32] where an output has one; float, or uint8 or int8 under super scales; mins of
            uint8 without ``super_mins`` are zeros, which scales multiply and which are subtracted; scales of uint8 beside E2M1 codes are exponents.
        super_scales, super_mins: float16 [blocks, super groups, 32]; ``super_mins`` are subtracted.
        layout: what they mean.
        order: int32 [K], the input that each column multiplies, or None where they are in order.
    """

    codes: jax.Array
    scales: jax.Array | None
    mins: jax.Array | None
    super_scales: jax.Array | None
    super_mins: jax.Array | None
    layout: PackedLayout = struct.field(pytree_node=False)
    order: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the matrix."""
        return self.layout.shape

    @property
    def num_outliers(self) -> int:
        """See :class:`PackedLayout`."""
        return self.layout.num_outliers

    def without_outliers(self, *, quantizes_input: bool) -> "PackedWeight":
        """The same weight for the inputs that are quantized, or for those that are not."""
        return self.replace(layout=dataclasses.replace(self.layout, num_outliers=0, quantizes_input=quantizes_input))

    def arrays(self) -> dict[str, Any]:
        """The arrays that are there, by name, in the order the kernels take them."""
        named = {name: getattr(self, name) for name in ("codes", "scales", "mins", "super_scales", "super_mins")}
        return {name: array for name, array in named.items() if array is not None}

    def specs(self, partition: Partition) -> "PackedWeight":
        """The ``PartitionSpec`` of each array, in its place."""
        return self.replace(**{name: partition.spec(self.layout.array_axes(name)) for name in self.arrays()})

    def attributes(self, *, has_bias: bool = False) -> list[int]:
        """How bindings.cc has a shard of it described.

        Raises:
            ValueError: mins that the kernels would not read.
        """
        layout = self.layout
        if self.mins is not None and layout.group < BLOCK:
            raise ValueError(f"mins of groups of {layout.group} inputs; there may be mins of groups of {BLOCK} or more only")
        return [int(layout.format), *layout.shard_shape, layout.group, layout.super_group, layout.zero, int(layout.quantizes_input),
                *(int(getattr(self, name) is not None) for name in ("scales", "mins", "super_scales", "super_mins")), int(has_bias)]


def pack_rows(code_format: Format, rows: np.ndarray, out: np.ndarray, *, first_row: int = 0) -> None:
    """Pack some rows of a matrix, or of its codes.

    Args:
        code_format: of the codes.
        rows: [n, k], a dtype of as many bytes as a code's own; k is that of a shard. n is a multiple of 32 but for the last rows.
        out: uint8 [blocks, units, bytes] of the whole shard.
        first_row: where ``rows`` begin in the shard, a multiple of 32.
    """
    (num_rows, num_columns), item_bytes = rows.shape, ITEM_BYTES.get(code_format, 1)
    if rows.dtype.itemsize != item_bytes or (num_columns and rows.strides[1] != item_bytes) or first_row % BLOCK or not out.flags.c_contiguous:
        raise ValueError(f"cannot pack {rows.dtype} {rows.shape} from row {first_row} as {code_format.name}")
    first_block, num_blocks = first_row // BLOCK, -(-num_rows // BLOCK)
    if out.shape[0] < first_block + num_blocks or out.shape[1:] != (-(-num_columns // BLOCK), UNIT_BYTES[code_format]):
        raise ValueError(f"{rows.shape} packed as {code_format.name} does not fit {out.shape} from block {first_block} on")
    target = out[first_block:first_block + num_blocks]
    if num_rows:
        load_library().tpllm_pack(int(code_format), rows.ctypes.data, num_rows, num_columns, rows.strides[0] // item_bytes, 0, num_blocks,
                                  target.ctypes.data)
