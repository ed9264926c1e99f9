"""Weights for the native kernels of CPUs: the layout of csrc/kernels.h, made once at load, block by block."""
import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import numpy as np
from flax import struct

from sharding_rules import Partition
from tpllm.native import library
from tpllm.weights import native_products as products
from tpllm.weights.layout import Arrays, Layout
from tpllm.weights.quantize import SCHEMES
from tpllm.weights.regroup import fit_groups
from tpllm.weights.scheme import QuantizedRows, Scheme, widened
from tpllm.weights.sharded import ShardedWeight

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
FLOAT_FORMATS = {"e4m3": Format.E4M3, "e5m2": Format.E5M2, "e2m1": Format.E2M1}
INTEGER_FORMATS = {2: Format.Q2, 3: Format.Q3, 4: Format.I4, 5: Format.Q5, 6: Format.Q6, 8: Format.I8}
DENSE = {np.dtype(np.float32): Format.F32, np.dtype(np.float16): Format.F16, np.dtype(jax.numpy.bfloat16): Format.BF16}
GROUPS = {Format.F32: (0,), Format.F16: (0,), Format.BF16: (0,), Format.Q2: (32, 64, 128, 256), Format.Q3: (32, 64, 128, 256),
          Format.Q5: (32, 64, 128, 256), Format.Q6: (16, 32, 64, 128, 256), Format.E2M1: (16, 32)}
"""Those that a format has kernels for; of the others 0 and 32 to 256."""


def groups_of(code_format: Format) -> tuple[int, ...]:
    """The groups that a format has kernels for; 0 where an output may have one scale."""
    return GROUPS.get(code_format, (0, 32, 64, 128, 256))


def format_of(scheme: Scheme) -> Format:
    """The kernels' format of the codes of a scheme."""
    return FLOAT_FORMATS.get(scheme.kind) or INTEGER_FORMATS[widened(scheme).bits]


@dataclasses.dataclass(frozen=True)
class NativeLayout(Layout):
    """What the arrays of a :class:`NativeWeight` mean, and how rows are written into them.

    Raises:
        ValueError: there is no kernel for this.
    """

    def __post_init__(self) -> None:
        if self.kept is None:
            return
        group, super_group, groups = self.kept.group, self.kept.super_group, groups_of(self.format)
        if group not in groups:
            raise ValueError(f"{self.format.name} codes in groups of {group}; groups may be {', '.join(map(str, groups))}, where 0 is one scale an "
                             "output")
        ratio = super_group // group if group else 0
        if super_group and (ratio < 1 or ratio & (ratio - 1) or ratio * group != super_group):
            raise ValueError(f"super groups of {super_group} and groups of {group}; one must be a power of two times the other")
        if self.kept.quantizes_input and (self.format != Format.I8 or group):
            raise ValueError(f"{self.format.name} codes in groups of {group} times int8 activations; there only I8 with one scale an output")

    @classmethod
    def of(cls, scheme: Scheme | None, shape: tuple[int, int], axes: tuple[str | None, str | None], partition: Partition, *, dtype: np.dtype,
           name: str) -> Self:
        """The layout of a matrix.

        Args:
            scheme: of the rows that are written; None for floats of ``dtype``.
            shape, axes, partition: see :class:`.Layout`.
            dtype: of activations.
            name: of the parameter, for errors.

        Raises:
            ShardingError: shards that cut groups for which no scale can be repeated.
        """
        if scheme is None:
            return cls(None, shape, axes, partition, dtype)
        kept = fit_groups(scheme, shape[1], partition.size(axes[1]), allowed=groups_of(format_of(scheme)), name=name)
        return cls(kept, shape, axes, partition, scheme=scheme)

    @property
    def format(self) -> Format:
        """The format of the codes."""
        return DENSE[self.source_dtype] if self.kept is None else format_of(self.kept)

    @property
    def zero(self) -> int:
        """What is taken from each integer code; of I8, whose codes are signed, 1 says that -128 may occur, which our own quantizing does not make."""
        if self.kept is None:
            return 0
        return 1 if self.format == Format.I8 and self.kept.name not in SCHEMES else self.kept.zero

    def arrays(self) -> Arrays:
        """See :meth:`.Layout.arrays`: shard after shard."""
        shapes = self.array_shapes()
        if self.kept is None:
            return {"codes": (shapes["codes"], np.dtype(np.uint8), self.array_axes("codes"))}
        dtypes = {name: dtype for name, (_, dtype) in self.kept.arrays(self.shape[1]).items()} | {"codes": np.dtype(np.uint8)}
        return {name: (shapes[name], dtype, self.array_axes(name)) for name, dtype in dtypes.items()}

    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that arrays have where they are there."""
        group, super_group = (0, 0) if self.kept is None else (self.kept.group, self.kept.super_group)
        shard_units = -(-self.shard_shape[1] // BLOCK)
        blocks, units = self.num_shards[0] * -(-self.shard_shape[0] // BLOCK), self.num_shards[1] * shard_units
        scales = (blocks, units * BLOCK // group, BLOCK) if group else (blocks, BLOCK)
        supers = (blocks, self.num_shards[1] * -(-shard_units * BLOCK // super_group), BLOCK) if super_group else ()
        return {"codes": (blocks, units, UNIT_BYTES[self.format]), "scales": scales, "mins": scales, "super_scales": supers, "super_mins": supers}

    def array_axes(self, name: str) -> tuple[str | None, ...]:
        """See :meth:`.Layout.array_axes`."""
        n_axis, k_axis = self.axes
        return (n_axis, None) if name in ("scales", "mins") and not self.kept.group else (n_axis, k_axis, None)

    def write(self, rows: np.ndarray | QuantizedRows, first_row: int, shard: int, out: Mapping[str, np.ndarray]) -> None:
        """See :meth:`.Layout.write`."""
        if self.kept is None:
            width = self.shard_shape[1]
            return pack_rows(self.format, rows[:, shard * width:(shard + 1) * width], out["codes"], first_row=first_row)
        part = self.shard_rows(rows, shard)
        pack_rows(self.format, np.ascontiguousarray(part.codes), out["codes"], first_row=first_row)
        for name, values in part.arrays().items():
            if name != "codes" and values is not None:
                _write_scales(values, first_row, out[name])
        return None

    def build(self, arrays: Mapping[str, Any]) -> "NativeWeight":
        """See :meth:`.Layout.build`."""
        return NativeWeight.of(self, arrays)


@struct.dataclass
class NativeWeight(ShardedWeight):
    """One matrix as the native kernels read it, in the order in which they take the arrays.

    Attributes:
        codes: uint8 [blocks, units, bytes].
        scales, mins: [blocks, groups, 32], or [blocks, 32] where an output has one; float, or uint8 or int8 under super scales; mins of
            uint8 without ``super_mins`` are zeros, which scales multiply and which are subtracted; scales of uint8 beside E2M1 codes are exponents.
        super_scales, super_mins: float16 [blocks, super groups, 32]; ``super_mins`` are subtracted.
        layout, order: see :class:`.Weight`.
    """

    is_native: ClassVar[bool] = True
    codes: jax.Array
    scales: jax.Array | None
    mins: jax.Array | None
    super_scales: jax.Array | None
    super_mins: jax.Array | None
    layout: NativeLayout = struct.field(pytree_node=False)
    order: jax.Array | None = None

    def attributes(self, *, has_bias: bool = False) -> list[int]:
        """How bindings.cc has a shard of it described.

        Raises:
            ValueError: mins that the kernels would not read.
        """
        layout, kept = self.layout, self.layout.kept
        group, super_group, quantizes_input = (0, 0, False) if kept is None else (kept.group, kept.super_group, kept.quantizes_input)
        if self.mins is not None and group < BLOCK:
            raise ValueError(f"mins of groups of {group} inputs; there may be mins of groups of {BLOCK} or more only")
        return [int(layout.format), *layout.shard_shape, group, super_group, layout.zero, int(quantizes_input),
                *(int(getattr(self, name) is not None) for name in self.ARRAYS[1:]), int(has_bias)]

    shard_matmul = staticmethod(products.linear)
    shard_gated_mlp = staticmethod(products.gated_mlp)
    expert_mlps = staticmethod(products.expert_mlps)

    def shard_lookup(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """See ``tpllm.weights.native_products.lookup``."""
        return products.lookup(tokens, self, dtype)


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
        library.load_library().tpllm_pack(int(code_format), rows.ctypes.data, num_rows, num_columns, rows.strides[0] // item_bytes, 0, num_blocks,
                                          target.ctypes.data)


def _write_scales(values_NG: np.ndarray, first_row: int, out: np.ndarray) -> None:
    """Into [blocks, groups, 32], or [blocks, 32] where an output has one; padding is zeros."""
    num_blocks, num_groups = -(-values_NG.shape[0] // BLOCK), out.shape[1] if out.ndim == 3 else 1
    padded = np.zeros((num_blocks * BLOCK, num_groups), values_NG.dtype)
    padded[:values_NG.shape[0], :values_NG.shape[1]] = values_NG
    blocks = padded.reshape(num_blocks, BLOCK, num_groups).transpose(0, 2, 1)
    out[first_row // BLOCK:first_row // BLOCK + num_blocks] = blocks if out.ndim == 3 else blocks[:, 0]
