"""Quantized weights for the kernels of accelerators, as ``pallas_kernels.quant_matmul`` packs them, made once at load, shard by shard."""
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pallas_kernels.gated_mlp import Activation, gated_product
from pallas_kernels.implementations import REFERENCE
from pallas_kernels.quant_matmul import PackedArrays, WeightFormat, dequantize_packed, has_rows_kernel, layout_for, pack, quant_matmul
from pallas_kernels.tiling import Device
from sharding_rules import Partition
from sharding_rules.axes import EXPERT_MLP, EXPERTS
from tpllm.weights.layout import Arrays, Layout
from tpllm.weights.regroup import fit_groups
from tpllm.weights.scheme import QuantizedRows, Scheme
from tpllm.weights.sharded import ShardedWeight
from tpllm.weights.weight import Biases

GROUPS = (0, 16, 32, 64, 128, 256)
TRITON_GROUPS = (32, 64, 128)  # of codes of 4 bits, the one product that GPUs without Mosaic's kernels have

# Jitted, so that layers whose kernels are alike share one: to lower a kernel takes longer than all the rest of a layer.
_quant_matmul = jax.jit(quant_matmul, static_argnames=("weight_format", "device", "num_outputs", "dtype", "implementation"))
_gated_product = jax.jit(gated_product, static_argnames=("activation", "weight_format", "device", "num_outputs", "implementation"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AcceleratorLayout(Layout):
    """What the arrays of an :class:`AcceleratorWeight` mean, and how rows are written into them.

    Attributes:
        device: whose kernels read it.
    """

    device: Device

    @classmethod
    def of(cls, scheme: Scheme, shape: tuple[int, int], axes: tuple[str | None, str | None], partition: Partition, *, device: Device,
           name: str) -> Self | None:
        """How a device's kernels want a matrix; None where they have none for its codes, or cannot read it otherwise: of routed experts, or an
        embedding.

        Args:
            scheme: of the rows that are to be written.
            shape, axes, partition: see :class:`.Layout`.
            device: whose kernels.
            name: of the parameter, for errors.

        Raises:
            ShardingError: shards that cut groups for which no scale can be repeated.
        """
        is_known = scheme.bits in (4, 5, 6, 7, 8) and scheme.kind != "e2m1"
        if not is_known or {EXPERTS, EXPERT_MLP} & set(axes):
            return None
        kept, layout = fit_groups(scheme, shape[1], partition.size(axes[1]), allowed=GROUPS, name=name), layout_for(device)
        if layout == "columns" and name == "embed":  # a table of which rows are read: XLA would turn all of it over for that
            return None
        if layout == "rows" and not (kept.bits == 4 and kept.group in TRITON_GROUPS and not kept.super_group and has_rows_kernel()):
            return None
        return cls(kept, shape, axes, partition, scheme=scheme, device=device)

    @functools.cached_property
    def weight_format(self) -> WeightFormat:
        """The format of a shard."""
        kept = self.kept
        return WeightFormat(bits=kept.bits, kind=kept.kind, group=kept.group, zero=kept.zero, mins=kept.mins, super_group=kept.super_group,
                            activations="int8" if kept.quantizes_input else "float", layout=layout_for(self.device))

    @property
    def has_outputs_first(self) -> bool:
        """Whether codes have outputs first and inputs second."""
        return self.weight_format.layout != "columns"

    @property
    def options(self) -> dict[str, Any]:
        """What the ops take: they choose among the kernels of the device that the weight is packed for; where the mesh is another's, only the
        reference reads it."""
        implementation = None if self.partition.platform == self.device.platform else REFERENCE
        return {"weight_format": self.weight_format, "num_outputs": self.shard_shape[0], "device": self.device, "implementation": implementation}

    def arrays(self) -> Arrays:
        """See :meth:`.Layout.arrays`."""
        rows = {name: jax.ShapeDtypeStruct((self.shard_shape[0], columns), dtype)
                for name, (columns, dtype) in self.kept.arrays(self.shard_shape[1]).items()}
        packed = jax.eval_shape(functools.partial(pack, self.weight_format), rows["codes"], *(rows.get(name) for name in PackedArrays._fields[2:]))
        return {name: ((*self.num_shards, *array.shape), np.dtype(array.dtype), self.array_axes(name))
                for name, array in packed._asdict().items() if array is not None}

    def array_axes(self, name: str) -> tuple[str | None, ...]:
        """See :meth:`.Layout.array_axes`: those of N and K cut the first two dims, and each shard has arrays of its own."""
        return (*self.axes, None, None)

    def write(self, rows: QuantizedRows, first_row: int, shard: int, out: Mapping[str, np.ndarray]) -> None:
        """See :meth:`.Layout.write`; the last rows bring what N is padded with."""
        part, num_rows = self.shard_rows(rows, shard), len(rows.codes)
        packed = pack(self.weight_format, part.codes, part.scales, part.mins, part.super_scales, part.super_mins)
        is_last = first_row + num_rows == self.shard_shape[0]
        for name, target in out.items():
            values, target = getattr(packed, name), target[0, 0]
            if not (name in ("codes", "high") and self.has_outputs_first):
                values, target = values.T, target.T
            values = values if is_last else values[:num_rows]
            target[first_row:first_row + len(values)] = values

    def build(self, arrays: Mapping[str, Any]) -> "AcceleratorWeight":
        """See :meth:`.Layout.build`."""
        return AcceleratorWeight.of(self, arrays)


@struct.dataclass
class AcceleratorWeight(ShardedWeight):
    """One matrix as the kernels of an accelerator read it.

    Attributes:
        codes, high, scales, mins, super_scales, super_mins: of :class:`~pallas_kernels.quant_matmul.PackedArrays`, each behind two dims more: the
            shards of N, and those of K.
        layout, order: see :class:`.Weight`.
    """

    ARRAYS: ClassVar[tuple[str, ...]] = PackedArrays._fields
    codes: jax.Array
    high: jax.Array | None
    scales: jax.Array
    mins: jax.Array | None
    super_scales: jax.Array | None
    super_mins: jax.Array | None
    layout: AcceleratorLayout = struct.field(pytree_node=False)
    order: jax.Array | None = None

    @property
    def shard(self) -> PackedArrays:
        """The arrays of the one shard that a device sees."""
        return PackedArrays(**dict.fromkeys(self.ARRAYS) | {name: array[0, 0] for name, array in self.arrays().items()})

    def fuses_with(self, up: Self) -> bool:
        """See :meth:`.Weight.fuses_with`: the kernel takes gate and up in one format."""
        return self.layout.weight_format == up.layout.weight_format

    @classmethod
    def shard_matmul(cls, x_D: jax.Array, weights: Sequence[Self], biases: Biases, dtype: Any) -> tuple[jax.Array, ...]:
        """See :meth:`.ShardedWeight.shard_matmul`."""
        outs = (_quant_matmul(x_D.reshape(-1, x_D.shape[-1]), weight.shard, bias=bias, dtype=dtype, **weight.layout.options)
                for weight, bias in zip(weights, biases, strict=True))
        return tuple(out.reshape(*x_D.shape[:-1], -1) for out in outs)

    @classmethod
    def shard_gated_mlp(cls, x_BTD: jax.Array, weights: tuple[Self, Self, Self], biases: Biases, activation: Activation) -> jax.Array:
        """See :meth:`.ShardedWeight.shard_gated_mlp`."""
        gate, up, down = weights
        inner_BTF = _gated_product(x_BTD, gate.shard, up.shard, activation=activation, biases=biases[:2], **gate.layout.options)
        return cls.shard_matmul(inner_BTF, (down,), biases[2:], x_BTD.dtype)[0]

    @classmethod
    def expert_mlps(cls, x_SD: jax.Array, counts_E: jax.Array, weights: tuple[Self, Self, Self], biases: Biases, *, activation: Activation,
                    inner_size: int) -> jax.Array:
        """There is no kernel for it: matrices of experts are left to XLA."""
        raise NotImplementedError

    def shard_lookup(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """See :meth:`.ShardedWeight.shard_lookup`."""
        layout = self.layout
        is_own, rows = (tokens >= 0) & (tokens < layout.shard_shape[0]), tokens.reshape(-1)
        rows = jnp.where(is_own.reshape(-1), rows, 0)
        taken = {name: None if array is None else array[rows] if name in ("codes", "high") and layout.has_outputs_first else array[:, rows]
                 for name, array in self.shard._asdict().items()}
        values = dequantize_packed(layout.weight_format, PackedArrays(**taken))[:, :layout.shard_shape[1]]
        return jnp.where(is_own[..., None], values.astype(dtype).reshape(*tokens.shape, -1), 0)
