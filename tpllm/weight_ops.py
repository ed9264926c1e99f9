"""Products with weights packed for kernels, in one call a shard: for the native ones of CPUs, and for those of accelerators."""
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.gated_mlp import Activation, gated_product
from pallas_kernels.implementations import REFERENCE
from pallas_kernels.quant_matmul import PackedArrays, dequantize_packed, quant_matmul
from sharding_rules import Partition
from sharding_rules.axes import BATCH
from tpllm.kernel_weights import KernelLayout, KernelWeight
from tpllm.native import products
from tpllm.native.packed import PackedWeight
from tpllm.ops import HIDDEN_AXES, POSITION_AXES

Packed = PackedWeight | KernelWeight

# Jitted, so that layers whose kernels are alike share one: to lower a kernel takes longer than all the rest of a layer.
_quant_matmul = jax.jit(quant_matmul, static_argnames=("weight_format", "device", "num_outputs", "dtype", "implementation"))
_gated_product = jax.jit(gated_product, static_argnames=("activation", "weight_format", "device", "num_outputs", "implementation"))


def packed_linears(x_D: jax.Array, weights: Sequence[Packed], biases: Sequence[jax.Array | None], dtype=None) -> tuple[jax.Array, ...]:
    """``x @ w.T + bias`` for packed weights of one kind that are cut alike, in one call a shard.

    Args:
        x_D: [..., D], the first dim over the batch axis.
        weights: each [F, D]; where D is cut, so is ``x_D``, and the shards' sums are added.
        biases: each [F] or None.
        dtype: of the results; None for ``x_D``'s.
    """
    layout = weights[0].layout
    n_axes, k_axis = [weight.layout.axes[0] for weight in weights], layout.axes[1]
    is_summed = layout.num_shards[1] > 1
    inner_biases = [None] * len(weights) if is_summed else biases

    def multiply(x, weights, biases):
        return tuple(layout.partition.sum_shards(out, k_axis) for out in _linears(x, weights, biases, dtype))
    lead = (BATCH, *(None,) * (x_D.ndim - 2))
    outs = _on_weight_shards(multiply, layout.partition, (*lead, k_axis), weights, [(axis,) for axis in n_axes], inner_biases,
                             out_axes=[(*lead, axis) for axis in n_axes])(x_D, tuple(weights), tuple(inner_biases))
    return tuple(out if bias is None or not is_summed else out + bias.astype(out.dtype) for out, bias in zip(outs, biases, strict=True))


def packed_gated_mlp(x_BTD: jax.Array, weights: tuple[Packed, Packed, Packed],
                     biases: tuple[jax.Array | None, jax.Array | None, jax.Array | None], *, activation: Activation) -> jax.Array:
    """``down(act(gate(x)) * up(x))`` for (gate, up, down) packed for one kind of kernel, in one call a shard; an accelerator's takes gate and up in
    one format."""
    layout = weights[2].layout
    mlp_axis, is_summed = layout.axes[1], layout.num_shards[1] > 1
    inner_biases = (*biases[:2], None if is_summed else biases[2])

    def multiply(x, weights, biases):
        return (layout.partition.sum_shards(_gated_mlp(x, weights, biases, activation), mlp_axis),)
    out = _on_weight_shards(multiply, layout.partition, HIDDEN_AXES, weights, [(mlp_axis,), (mlp_axis,), (None,)], inner_biases,
                            out_axes=[HIDDEN_AXES])(x_BTD, weights, inner_biases)[0]
    return out if biases[2] is None or not is_summed else out + biases[2].astype(out.dtype)


def packed_lookup(tokens_BT: jax.Array, table: Packed, dtype) -> jax.Array:
    """[B, T, D]: rows of a packed embedding; ids beyond it count as the nearest one that is there."""
    layout = table.layout
    tokens_BT = jnp.clip(tokens_BT, 0, layout.shape[0] - 1)

    def read(tokens, weights, _):
        axis = layout.axes[0]
        own = tokens if layout.num_shards[0] == 1 else tokens - layout.partition.shard_index(axis) * layout.shard_shape[0]
        return (layout.partition.sum_shards(_lookup(own, weights[0], dtype), axis),)
    return _on_weight_shards(read, layout.partition, POSITION_AXES, (table,), [()], (None,), out_axes=[HIDDEN_AXES])(tokens_BT, (table,), (None,))[0]


def _linears(x_D: jax.Array, weights: Sequence[Packed], biases: Sequence[jax.Array | None], dtype) -> tuple[jax.Array, ...]:
    """Products of a shard."""
    if isinstance(weights[0], PackedWeight):
        return products.linear(x_D, weights, biases, dtype)
    return tuple(_multiply(x_D, weight, bias, dtype) for weight, bias in zip(weights, biases, strict=True))


def _gated_mlp(x_BTD: jax.Array, weights: tuple[Packed, Packed, Packed], biases: Sequence[jax.Array | None], activation: Activation) -> jax.Array:
    """The layer of a shard."""
    if isinstance(weights[0], PackedWeight):
        return products.gated_mlp(x_BTD, *weights, biases, activation=activation)
    gate, up, down = weights
    inner_BTF = _gated_product(x_BTD, gate.shard, up.shard, activation=activation, weight_format=gate.layout.weight_format, biases=biases[:2],
                               num_outputs=gate.layout.shard_shape[0], **_how(gate.layout))
    return _multiply(inner_BTF, down, biases[2], x_BTD.dtype)


def _lookup(tokens: jax.Array, table: Packed, dtype) -> jax.Array:
    """[..., K]: rows of a shard; a token outside of it gives zeros."""
    if isinstance(table, PackedWeight):
        return products.lookup(tokens, table, dtype)
    is_own, rows = (tokens >= 0) & (tokens < table.layout.shard_shape[0]), tokens.reshape(-1)
    rows = jnp.where(is_own.reshape(-1), rows, 0)
    taken = {name: None if array is None else array[rows] if name in ("codes", "high") and table.layout.has_outputs_first else array[:, rows]
             for name, array in table.shard._asdict().items()}
    values = dequantize_packed(table.layout.weight_format, PackedArrays(**taken))[:, :table.layout.shard_shape[1]]
    return jnp.where(is_own[..., None], values.astype(dtype).reshape(*tokens.shape, -1), 0)


def _multiply(x_D: jax.Array, weight: KernelWeight, bias_F: jax.Array | None, dtype) -> jax.Array:
    layout = weight.layout
    out = _quant_matmul(x_D.reshape(-1, x_D.shape[-1]), weight.shard, weight_format=layout.weight_format, num_outputs=layout.shard_shape[0],
                        bias=bias_F, dtype=dtype or x_D.dtype, **_how(layout))
    return out.reshape(*x_D.shape[:-1], -1)


def _how(layout: KernelLayout) -> dict:
    """The op chooses among the kernels of the device that the weight is packed for; where the mesh is another's, only the reference reads it."""
    return {"device": layout.device, "implementation": None if layout.partition.platform == layout.device.platform else REFERENCE}


def _on_weight_shards(function, partition: Partition, x_axes, weights: Sequence[Packed], bias_axes, biases, *, out_axes):
    """``function(x, weights, biases)`` run by each device on its shards."""
    bias_specs = tuple(None if bias is None else partition.spec(axes) for bias, axes in zip(biases, bias_axes, strict=True))
    weight_specs = tuple(weight.specs(partition) for weight in weights)
    return partition.shard_map(function, (partition.spec(x_axes), weight_specs, bias_specs), tuple(map(partition.spec, out_axes)))
