"""The one place that picks an implementation of an op, from the platform of the model's mesh, and lays it on the mesh.

Kernels run inside ``jax.shard_map``, each on its own shard: left to automatic partitioning, XLA would gather what they read.
"""
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import flash_attention_reference
from pallas_kernels.kv_append import kv_append_reference
from pallas_kernels.paged_attention import paged_attention_reference
from pallas_kernels.rms_norm import rms_norm_reference
from pallas_kernels.rope import rope_reference
from sharding_rules import Partition
from sharding_rules.axes import BATCH, HEAD_DIM, HEADS, KV_HEADS, VOCAB
from tpllm import native
from tpllm.native import attention as native_attention
from tpllm.native import products
from tpllm.native.packed import PackedWeight

QUERY_AXES = (BATCH, None, HEADS, HEAD_DIM)
NEW_KV_AXES = (BATCH, None, KV_HEADS, HEAD_DIM)
CACHE_AXES = (BATCH, KV_HEADS, None, HEAD_DIM)
POSITION_AXES = (BATCH, None)
ROPE_AXES = (BATCH, None, None)
ROW_AXES = (BATCH,)
HIDDEN_AXES = (BATCH, None, None)


def uses_native(partition: Partition | None) -> bool:
    """Whether a model on this mesh runs on the native kernels of CPUs."""
    platform = jax.default_backend() if partition is None else partition.platform
    return platform == "cpu" and native.is_available()


def self_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array, *, rope: tuple[jax.Array, jax.Array],
                   scale: float, window: int | None, partition: Partition | None) -> jax.Array:
    """Causal attention of a call's tokens to each other, queries and keys rotated; [B, T, N, H]. See ``flash_attention_reference``."""
    def attend(q, k, v, positions, *rope):
        return flash_attention_reference(rope_reference(q, *rope), rope_reference(k, *rope), v, positions, scale=scale, window=window)
    return _on_shards(attend, partition, (QUERY_AXES, NEW_KV_AXES, NEW_KV_AXES, POSITION_AXES, ROPE_AXES, ROPE_AXES), (QUERY_AXES,))(
        q_BTNH, k_BTKH, v_BTKH, positions_BT, *rope)


def cached_attention(q_BTNH: jax.Array, new_kv: tuple[jax.Array, jax.Array], cache_kv: tuple[jax.Array, jax.Array],
                     positions_BT: jax.Array, *, rope: tuple[jax.Array, jax.Array], rows_B: jax.Array | None, scale: float, window: int | None,
                     partition: Partition | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotate queries and keys, append keys and values to one layer's cache, then attend to it.

    Args:
        q_BTNH: queries.
        new_kv: (k_BTKH, v_BTKH) of the same tokens.
        cache_kv: (k_PKSH, v_PKSH).
        positions_BT: int32; negative marks padding.
        rope: (cos_BTR, sin_BTR) of the tokens.
        rows_B: int32 cache row of each batch row, or None where they are the same. Under a data axis they count within each data group.
        scale, window: see ``paged_attention_reference``.
        partition: the model's mesh and rules.

    Returns:
        (out_BTNH, k_PKSH, v_PKSH).
    """
    attend = _native_cached_attention if uses_native(partition) else _cached_attention_reference
    arguments = (q_BTNH, *new_kv, *cache_kv, positions_BT, *rope)
    in_axes = (QUERY_AXES, NEW_KV_AXES, NEW_KV_AXES, CACHE_AXES, CACHE_AXES, POSITION_AXES, ROPE_AXES, ROPE_AXES)
    if rows_B is not None:
        arguments, in_axes = (*arguments, rows_B), (*in_axes, ROW_AXES)
    function = functools.partial(attend, scale=scale, window=window)
    return _on_shards(function, partition, in_axes, (QUERY_AXES, CACHE_AXES, CACHE_AXES))(*arguments)


def _native_cached_attention(q, new_k, new_v, cache_k, cache_v, positions, cos, sin, rows=None, *, scale, window):
    return native_attention.attention(q, (new_k, new_v), (cache_k, cache_v), positions, rope=(cos, sin), rows_B=rows, scale=scale, window=window,
                                      softcap=None)


def _cached_attention_reference(q, new_k, new_v, cache_k, cache_v, positions, cos, sin, rows=None, *, scale, window):
    cache_k = kv_append_reference(cache_k, rope_reference(new_k, cos, sin), positions, rows)
    cache_v = kv_append_reference(cache_v, new_v, positions, rows)
    out = paged_attention_reference(rope_reference(q, cos, sin), cache_k, cache_v, positions, rows_B=rows, scale=scale, window=window)
    return out, cache_k, cache_v


def rms_norm(x_D: jax.Array, weight_D: jax.Array, *, eps: float, partition: Partition | None,
             axes: tuple[str | None, ...] = HIDDEN_AXES) -> jax.Array:
    """Normalize the last dim; see ``rms_norm_reference``. ``axes`` are the logical axes of ``x_D``."""
    return _norm(x_D, None, weight_D, eps=eps, partition=partition, axes=axes)[0]


def add_rms_norm(x_BTD: jax.Array, delta_BTD: jax.Array, weight_D: jax.Array, *, eps: float,
                 partition: Partition | None) -> tuple[jax.Array, jax.Array]:
    """(normalized sum, sum) of the residual stream and what a layer adds to it."""
    return _norm(x_BTD, delta_BTD, weight_D, eps=eps, partition=partition, axes=HIDDEN_AXES)


def _norm(x, delta, weight, *, eps, partition, axes):
    if not uses_native(partition):
        total = x if delta is None else x + delta
        return rms_norm_reference(total, weight, eps=eps), total
    arguments, in_axes = ((x, weight), (axes, (None,))) if delta is None else ((x, weight, delta), (axes, (None,), axes))
    outs = _on_shards(functools.partial(_native_norm, eps), partition, in_axes, (axes,) * (len(arguments) - 1))(*arguments)
    return outs if delta is not None else (outs, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _native_norm(eps, x, weight, delta=None):
    outs = native_attention.rms_norm(x, weight, delta, eps=eps)
    return outs if delta is not None else outs[0]


def _norm_reference(eps, x, weight, delta=None):
    total = x if delta is None else x + delta
    normed = rms_norm_reference(total, weight, eps=eps)
    return normed if delta is None else (normed, total)


_native_norm.defvjp(lambda eps, *arguments: (_native_norm(eps, *arguments), arguments),
                    lambda eps, arguments, gradients: jax.vjp(functools.partial(_norm_reference, eps), *arguments)[1](gradients))


def vocab_sums(x_BV: jax.Array, partition: Partition | None) -> jax.Array:
    """[B, ...]: float32 sums over the vocabulary, the last dim; on native kernels a row's has the same bits at any number of rows."""
    if not uses_native(partition):
        return jnp.sum(x_BV, axis=-1)
    if partition is None or partition.mesh.size == 1:
        return native_attention.row_sums(x_BV)

    def add_up(x):
        sums, axis = native_attention.row_sums(x), partition.rules.mesh_axis(VOCAB)
        return sums if partition.size(VOCAB) == 1 else jax.lax.psum(sums, axis)
    lead = (BATCH, *(None,) * (x_BV.ndim - 2))
    return _on_shards(add_up, partition, ((*lead, VOCAB),), (lead,))(x_BV)


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
                     biases: tuple[jax.Array | None, jax.Array | None, jax.Array | None], *, activation: str) -> jax.Array:
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


def _on_weight_shards(function, partition: Partition | None, x_axes, weights: Sequence[PackedWeight], bias_axes, biases, *, out_axes):
    """``function(x, weights, biases)`` run by each device on its shards."""
    if partition is None or partition.mesh.size == 1:
        return function

    def specs(weight):
        return weight.replace(**{name: partition.spec(weight.layout.array_axes(name)) for name in weight.arrays()})
    bias_specs = tuple(None if bias is None else partition.spec(axes) for bias, axes in zip(biases, bias_axes, strict=True))
    return jax.shard_map(function, mesh=partition.mesh, in_specs=(partition.spec(x_axes), tuple(map(specs, weights)), bias_specs),
                         out_specs=tuple(map(partition.spec, out_axes)), check_vma=False)


def _on_shards(function, partition: Partition | None, in_axes, out_axes):
    """``function`` run by each device on its shard of arrays with these logical axes; as it is where there is no mesh."""
    if partition is None or partition.mesh.size == 1:
        return function
    out_specs = tuple(map(partition.spec, out_axes))
    return jax.shard_map(function, mesh=partition.mesh, in_specs=tuple(map(partition.spec, in_axes)),
                         out_specs=out_specs if len(out_specs) > 1 else out_specs[0], check_vma=False)
