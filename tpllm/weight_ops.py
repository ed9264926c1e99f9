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

# Jitted, so that layers whose kernels are alike share one: to lower a kernel takes longer than all the rest of a layer.
_quant_matmul = jax.jit(quant_matmul, static_argnames=("weight_format", "device", "num_outputs", "dtype", "implementation"))
_gated_product = jax.jit(gated_product, static_argnames=("activation", "weight_format", "device", "num_outputs", "implementation"))


def packed_linears(x_D: jax.Array, weights: Sequence[PackedWeight], biases: Sequence[jax.Array | None], dtype=None) -> tuple[jax.Array, ...]:
    """``x @ w.T + bias`` for packed weights that are cut alike, in one call a shard.

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
        outs = products.linear(x, weights, biases, dtype)
        return tuple(jax.lax.psum(out, layout.partition.rules.mesh_axis(k_axis)) for out in outs) if is_summed else outs
    lead = (BATCH, *(None,) * (x_D.ndim - 2))
    outs = _on_weight_shards(multiply, layout.partition, (*lead, k_axis), weights, [(axis,) for axis in n_axes], inner_biases,
                             out_axes=[(*lead, axis) for axis in n_axes])(x_D, tuple(weights), tuple(inner_biases))
    return tuple(out if bias is None or not is_summed else out + bias.astype(out.dtype) for out, bias in zip(outs, biases, strict=True))


def packed_gated_mlp(x_BTD: jax.Array, weights: tuple[PackedWeight, PackedWeight, PackedWeight],
                     biases: tuple[jax.Array | None, jax.Array | None, jax.Array | None], *, activation: Activation) -> jax.Array:
    """``down(act(gate(x)) * up(x))`` for packed (gate, up, down), in one call a shard."""
    layout = weights[2].layout
    mlp_axis, is_summed = layout.axes[1], layout.num_shards[1] > 1
    inner_biases = (*biases[:2], None if is_summed else biases[2])

    def multiply(x, weights, biases):
        out = products.gated_mlp(x, *weights, biases, activation=activation)
        return (jax.lax.psum(out, layout.partition.rules.mesh_axis(mlp_axis)) if is_summed else out,)
    out = _on_weight_shards(multiply, layout.partition, HIDDEN_AXES, weights, [(mlp_axis,), (mlp_axis,), (None,)], inner_biases,
                            out_axes=[HIDDEN_AXES])(x_BTD, weights, inner_biases)[0]
    return out if biases[2] is None or not is_summed else out + biases[2].astype(out.dtype)


def packed_lookup(tokens_BT: jax.Array, table: PackedWeight, dtype) -> jax.Array:
    """[B, T, D]: rows of a packed embedding; ids beyond it count as the nearest one that is there."""
    layout = table.layout
    tokens_BT = jnp.clip(tokens_BT, 0, layout.shape[0] - 1)

    def read(tokens, weights, _):
        if layout.num_shards[0] == 1:
            return (products.lookup(tokens, weights[0], dtype),)
        axis = layout.partition.rules.mesh_axis(layout.axes[0])
        first = jax.lax.axis_index(axis) * layout.shard_shape[0]
        return (jax.lax.psum(products.lookup(tokens - first, weights[0], dtype), axis),)
    return _on_weight_shards(read, layout.partition, POSITION_AXES, (table,), [()], (None,), out_axes=[HIDDEN_AXES])(tokens_BT, (table,), (None,))[0]


def kernel_linear(x_D: jax.Array, weight: KernelWeight, bias_F: jax.Array | None, dtype=None) -> jax.Array:
    """``x @ w.T + bias`` for a weight packed for an accelerator's kernels; arguments as for :func:`packed_linears`."""
    layout = weight.layout
    (n_axis, k_axis), is_summed = layout.axes, layout.num_shards[1] > 1

    def multiply(x, weights, biases):
        return (_summed(_multiply(x, weights[0], biases[0], dtype), k_axis, layout),)
    lead = (BATCH, *(None,) * (x_D.ndim - 2))
    inner_biases = (None,) if is_summed else (bias_F,)
    out = _on_weight_shards(multiply, layout.partition, (*lead, k_axis), (weight,), [(n_axis,)], inner_biases, out_axes=[(*lead, n_axis)])(
        x_D, (weight,), inner_biases)[0]
    return out if bias_F is None or not is_summed else out + bias_F.astype(out.dtype)


def kernel_gated_mlp(x_BTD: jax.Array, weights: tuple[KernelWeight, KernelWeight, KernelWeight],
                     biases: tuple[jax.Array | None, jax.Array | None, jax.Array | None], *, activation: Activation) -> jax.Array:
    """``down(act(gate(x)) * up(x))`` for (gate, up, down) packed for an accelerator's kernels, gate and up in one format; in one call a shard."""
    layout = weights[2].layout
    mlp_axis, is_summed = layout.axes[1], layout.num_shards[1] > 1
    inner_biases = (*biases[:2], None if is_summed else biases[2])

    def multiply(x, weights, biases):
        gate, up, down = weights
        inner = _gated_product(x, gate.shard, up.shard, activation=activation, weight_format=gate.layout.weight_format, biases=biases[:2],
                              num_outputs=gate.layout.shard_shape[0], **_how(gate.layout))
        return (_summed(_multiply(inner, down, biases[2], x.dtype), mlp_axis, layout),)
    out = _on_weight_shards(multiply, layout.partition, HIDDEN_AXES, weights, [(mlp_axis,), (mlp_axis,), (None,)], inner_biases,
                            out_axes=[HIDDEN_AXES])(x_BTD, weights, inner_biases)[0]
    return out if biases[2] is None or not is_summed else out + biases[2].astype(out.dtype)


def kernel_lookup(tokens_BT: jax.Array, table: KernelWeight, dtype) -> jax.Array:
    """[B, T, D]: rows of an embedding packed for an accelerator's kernels; ids beyond it count as the nearest one that is there."""
    layout = table.layout
    tokens_BT = jnp.clip(tokens_BT, 0, layout.shape[0] - 1)

    def read(tokens, weights, _):
        if layout.num_shards[0] == 1:
            return (_rows(weights[0], tokens, dtype),)
        axis = layout.partition.rules.mesh_axis(layout.axes[0])
        own = tokens - jax.lax.axis_index(axis) * layout.shard_shape[0]
        is_own = (own >= 0) & (own < layout.shard_shape[0])
        return (jax.lax.psum(jnp.where(is_own[..., None], _rows(weights[0], jnp.where(is_own, own, 0), dtype), 0), axis),)
    return _on_weight_shards(read, layout.partition, POSITION_AXES, (table,), [()], (None,), out_axes=[HIDDEN_AXES])(tokens_BT, (table,), (None,))[0]


def _multiply(x_D: jax.Array, weight: KernelWeight, bias_F: jax.Array | None, dtype) -> jax.Array:
    layout = weight.layout
    out = _quant_matmul(x_D.reshape(-1, x_D.shape[-1]), weight.shard, weight_format=layout.weight_format, num_outputs=layout.shard_shape[0],
                        bias=bias_F, dtype=dtype or x_D.dtype, **_how(layout))
    return out.reshape(*x_D.shape[:-1], -1)


def _rows(table: KernelWeight, tokens: jax.Array, dtype) -> jax.Array:
    """[..., K]: rows of a shard."""
    rows = tokens.reshape(-1)
    taken = {name: None if array is None else array[rows] if name in ("codes", "high") and table.layout.has_outputs_first else array[:, rows]
             for name, array in table.shard._asdict().items()}
    values = dequantize_packed(table.layout.weight_format, PackedArrays(**taken))[:, :table.layout.shard_shape[1]]
    return values.astype(dtype).reshape(*tokens.shape, -1)


def _summed(out: jax.Array, axis: str | None, layout: KernelLayout) -> jax.Array:
    return jax.lax.psum(out, layout.partition.rules.mesh_axis(axis)) if layout.num_shards[1] > 1 else out


def _how(layout: KernelLayout) -> dict:
    """The op chooses among the kernels of the device that the weight is packed for; where the mesh is another's, only the reference reads it."""
    platform = jax.default_backend() if layout.partition is None else layout.partition.platform
    return {"device": layout.device, "implementation": None if platform == layout.device.platform else REFERENCE}


def _on_weight_shards(function, partition: Partition | None, x_axes, weights: Sequence[PackedWeight | KernelWeight], bias_axes, biases, *, out_axes):
    """``function(x, weights, biases)`` run by each device on its shards."""
    if partition is None or partition.mesh.size == 1:
        return function

    bias_specs = tuple(None if bias is None else partition.spec(axes) for bias, axes in zip(biases, bias_axes, strict=True))
    weight_specs = tuple(weight.specs(partition) for weight in weights)
    return jax.shard_map(function, mesh=partition.mesh, in_specs=(partition.spec(x_axes), weight_specs, bias_specs),
                         out_specs=tuple(map(partition.spec, out_axes)), check_vma=False)
