"""Matrices as XLA multiplies them: floats as they are, and quantized ones in the canonical layout, which defines what they stand for."""
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct

from pallas_kernels.expert_mlps import expert_mlps_reference
from pallas_kernels.gated_mlp import Activation, gated
from pallas_kernels.precision import matmul_precision
from pallas_kernels.quant_matmul import int8_matmul_reference
from sharding_rules import ONE_DEVICE, Partition
from tpllm.weights.bits import RUN, num_bytes, pack_bits, unpack_bits
from tpllm.weights.layout import Arrays, Layout
from tpllm.weights.regroup import fit_groups
from tpllm.weights.scheme import QuantizedRows, Scheme, dequantize
from tpllm.weights.weight import Biases, Weight

SMALL_CODES = {2: np.dtype(ml_dtypes.uint2), 3: np.dtype(ml_dtypes.uint4), 4: np.dtype(ml_dtypes.uint4)}
ODD_BITS = (3, 5, 6)
"""Codes of so many bits, for which XLA has no type, lie in bytes together where no shard cuts a run of them."""


@dataclasses.dataclass(frozen=True)
class XlaLayout(Layout):
    """What the arrays of an :class:`XlaWeight` mean, and how rows are written into them."""

    @classmethod
    def of(cls, scheme: Scheme, shape: tuple[int, int], axes: tuple[str | None, str | None] = (None, None), partition: Partition = ONE_DEVICE, *,
           name: str = "") -> Self:
        """The layout of a matrix of ``scheme``; ``name`` is the parameter's, for errors.

        Raises:
            ShardingError: shards that cut groups for which no scale can be repeated.
        """
        return cls(fit_groups(scheme, shape[1], partition.size(axes[1]), allowed=None, name=name), shape, axes, partition, scheme=scheme)

    @property
    def has_packed_codes(self) -> bool:
        """Whether codes lie in bytes together, as ``tpllm.weights.bits`` packs them."""
        is_odd = self.kept.kind == "int" and self.kept.bits in ODD_BITS
        return is_odd and (self.num_shards[1] == 1 or self.shard_shape[1] % RUN == 0)

    def arrays(self) -> Arrays:
        """See :meth:`.Layout.arrays`."""
        (N, K), kept, found = self.shape, self.kept, {}
        for name, (columns, dtype) in kept.arrays(K).items():
            if name == "codes" and self.has_packed_codes:
                columns, dtype = num_bytes(K, kept.bits), np.dtype(np.uint8)
            elif name == "codes" and kept.kind not in ("e4m3", "e5m2"):
                dtype = SMALL_CODES.get(kept.bits, dtype)
            found[name] = ((N, columns), dtype, self.array_axes(name))
        return found

    def array_axes(self, name: str) -> tuple[str | None, ...]:
        """See :meth:`.Layout.array_axes`."""
        return (self.axes[0], None) if name in ("scales", "mins") and not self.kept.group else self.axes

    def write(self, rows: QuantizedRows, first_row: int, shard: int, out: Mapping[str, np.ndarray]) -> None:
        """See :meth:`.Layout.write`."""
        part = self.shard_rows(rows, shard)
        if self.has_packed_codes:
            part = dataclasses.replace(part, codes=pack_bits(part.codes, self.kept.bits))
        for name, array in out.items():
            array[first_row:first_row + len(rows.codes)] = getattr(part, name).astype(array.dtype)

    def build(self, arrays: Mapping[str, Any]) -> "XlaWeight":
        """See :meth:`.Layout.build`."""
        return XlaWeight.of(self, arrays)


@struct.dataclass
class XlaWeight(Weight):
    """One matrix that XLA multiplies.

    Attributes:
        codes: [N, K] integers or fp8; or uint8 [N, bytes], where the layout packs them; or floats, without a scheme.
        scales, mins: [N, groups]; mins may be None.
        super_scales, super_mins: float16 [N, super groups] or None.
        layout, order: see :class:`.Weight`.
    """

    codes: jax.Array
    scales: jax.Array | None
    mins: jax.Array | None
    super_scales: jax.Array | None
    super_mins: jax.Array | None
    layout: XlaLayout = struct.field(pytree_node=False)
    order: jax.Array | None = None

    @property
    def quantizes_input(self) -> bool:
        """Whether it multiplies inputs that become int8."""
        return self.layout.kept is not None and self.layout.kept.quantizes_input

    def code_bytes(self) -> jax.Array:
        """[N, K] in the scheme's own dtype, a code a byte."""
        return _codes(self.codes, self.layout).astype(self.layout.kept.code_dtype)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """[N, K], computed in float32 as :func:`tpllm.weights.scheme.dequantize` does; columns as they are stored."""
        return _dequantize(self.arrays(), self.layout).astype(dtype)

    @classmethod
    def matmul(cls, x_D: jax.Array, weights: Sequence[Self], biases: Biases, dtype: Any) -> tuple[jax.Array, ...]:
        """See :meth:`.Weight.matmul`."""
        return tuple(weight._multiply(x_D, bias, dtype) for weight, bias in zip(weights, biases, strict=True))

    def _multiply(self, x_D: jax.Array, bias_F: jax.Array | None, dtype: Any) -> jax.Array:
        if self.quantizes_input:
            rows, scales_F = x_D.reshape(-1, x_D.shape[-1]), self.scales[:, 0].astype(jnp.float32)
            y_F = int8_matmul_reference(rows, self.codes, scales_F, dtype=dtype).reshape(*x_D.shape[:-1], -1)
        else:
            y_F = jax.lax.dot_general(x_D, self.dequantize(x_D.dtype), (((x_D.ndim - 1,), (1,)), ((), ())), precision=matmul_precision(x_D.dtype),
                                      preferred_element_type=jnp.dtype(dtype))
        return y_F if bias_F is None else y_F + bias_F.astype(y_F.dtype)

    @classmethod
    def gated_mlp(cls, x_BTD: jax.Array, weights: tuple[Self, Self, Self], biases: Biases, *, activation: Activation) -> jax.Array:
        """See :meth:`.Weight.gated_mlp`."""
        gate_BTF, up_BTF = cls.matmul(x_BTD, weights[:2], biases[:2], x_BTD.dtype)
        return cls.matmul(gated(gate_BTF, up_BTF, activation), weights[2:], biases[2:], x_BTD.dtype)[0]

    @classmethod
    def expert_mlps(cls, x_SD: jax.Array, counts_E: jax.Array, weights: tuple[Self, Self, Self], biases: Biases, *, activation: Activation,
                    inner_size: int) -> jax.Array:
        """See :meth:`.Weight.expert_mlps`."""
        num_experts, sizes = counts_E.shape[0], (inner_size, inner_size, x_SD.shape[1])
        rounds_input = tuple(weight.quantizes_input for weight in weights)
        rows = (weight.codes if weight.layout.kept is None else weight.dequantize(x_SD.dtype) for weight in weights)
        dense = [matrix.reshape(num_experts, -1, matrix.shape[1])[:, :size] for matrix, size in zip(rows, sizes, strict=True)]
        biases = tuple(None if bias is None else bias.reshape(num_experts, -1)[:, :size] for bias, size in zip(biases, sizes, strict=True))
        return expert_mlps_reference(x_SD, counts_E, *dense, activation=activation, biases=biases, rounds_input=rounds_input)

    def lookup(self, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
        """See :meth:`.Weight.lookup`."""
        taken = {name: array.at[tokens_BT].get(mode="clip") for name, array in self.arrays().items()}
        return _dequantize(taken, self.layout).astype(dtype)


def _dequantize(arrays: dict[str, jax.Array], layout: XlaLayout) -> jax.Array:
    return arrays["codes"] if layout.kept is None else dequantize(QuantizedRows(**arrays | {"codes": _codes(arrays["codes"], layout)}), layout.kept)


def _codes(codes: jax.Array, layout: XlaLayout) -> jax.Array:
    return unpack_bits(codes, layout.kept.bits, layout.shape[1]) if layout.has_packed_codes else codes
