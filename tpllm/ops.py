"""The one place that picks an implementation of an op, from the platform of the model's mesh, and lays it on the mesh.

Kernels run inside ``Partition.shard_map``, each on its own shard: left to automatic partitioning, XLA would gather what they read.
"""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.implementations import are_kernels_on
from pallas_kernels.kv_append import kv_append, kv_append_reference, quantize_entries
from pallas_kernels.layer_norm import layer_norm_reference
from pallas_kernels.page_table import PageTable
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.rms_norm import rms_norm_reference
from pallas_kernels.rope import rope_reference
from pallas_kernels.tiling import Device, device_of
from sharding_rules import Partition
from sharding_rules.axes import BATCH, HEAD_DIM, HEADS, KV_HEADS, VOCAB
from tpllm import native
from tpllm.native import attention as native_attention

QUERY_AXES = (BATCH, None, HEADS, HEAD_DIM)
NEW_KV_AXES = (BATCH, None, KV_HEADS, HEAD_DIM)
CACHE_AXES = (BATCH, KV_HEADS, None, HEAD_DIM)  # pages; each data group has its own
SCALE_AXES = CACHE_AXES[:3]
POSITION_AXES = (BATCH, None)
ROPE_AXES = (BATCH, None, None)
HEAD_AXES = (HEADS,)
HIDDEN_AXES = (BATCH, None, None)

# Jitted, so that layers whose kernels are alike share one: to lower a kernel takes longer than all the rest of a layer.
_paged_attention = jax.jit(paged_attention, static_argnames=("device", "scale", "window", "softcap"))
_kv_append = jax.jit(kv_append, static_argnames=("device",))


def uses_native(partition: Partition) -> bool:
    """Whether a model on this mesh runs on the native kernels of CPUs."""
    return partition.platform == "cpu" and native.is_available()


def device_with_kernels(partition: Partition) -> Device | None:
    """What the weights of this mesh are laid out for: a CPU with native kernels, or an accelerator; None where XLA multiplies all."""
    device = device_of(partition.device)
    return device if uses_native(partition) or device.platform in ("gpu", "tpu") else None


def choices(partition: Partition) -> tuple[bool, ...]:
    """What this module asks the process while a program is traced: programs are the same where these are, too."""
    return uses_native(partition), are_kernels_on()


def self_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array, *, rope: tuple[jax.Array, jax.Array],
                   scale: float, window: int | None, softcap: float | None, partition: Partition,
                   sinks_N: jax.Array | None = None) -> jax.Array:
    """Causal attention of a call's tokens to each other, queries and keys rotated; [B, T, N, H]. See ``flash_attention_reference``."""
    def attend(q, k, v, positions, cos, sin, *sinks):
        q, k = rope_reference(q, cos, sin), rope_reference(k, cos, sin)
        return flash_attention(q, k, v, positions, scale=scale, window=window, softcap=softcap, sinks_N=(*sinks, None)[0],
                               device=device_of(partition.device))
    sinks, sink_axes = _optional(sinks_N, HEAD_AXES)
    in_axes = (QUERY_AXES, NEW_KV_AXES, NEW_KV_AXES, POSITION_AXES, ROPE_AXES, ROPE_AXES, *sink_axes)
    return partition.shard_map(attend, tuple(map(partition.spec, in_axes)), partition.spec(QUERY_AXES))(
        q_BTNH, k_BTKH, v_BTKH, positions_BT, *rope, *sinks)


def _optional(array: jax.Array | None, axes: tuple[str | None, ...]) -> tuple[tuple[jax.Array, ...], tuple[tuple[str | None, ...], ...]]:
    """(the array, its axes) as arguments of a shard's function; none where there is none."""
    return ((), ()) if array is None else ((array,), (axes,))


def cached_attention(q_BTNH: jax.Array, new_kv: tuple[jax.Array, jax.Array], cache_kv: tuple[jax.Array, ...],
                     positions_BT: jax.Array, *, rope: tuple[jax.Array, jax.Array], table: PageTable | None, scale: float, window: int | None,
                     softcap: float | None, partition: Partition, sinks_N: jax.Array | None = None) -> tuple[jax.Array, ...]:
    """Rotate queries and keys, append keys and values to one layer's cache, then attend to it.

    Args:
        q_BTNH: queries.
        new_kv: (k_BTKH, v_BTKH) of the same tokens.
        cache_kv: (k_PKSH, v_PKSH), and the scales (k_PKS, v_PKS) of those that have some.
        positions_BT: int32; negative marks padding.
        rope: (cos_BTR, sin_BTR) of the tokens.
        table: where the rows' tokens lie, or None where batch row b is page b. Under a data axis rows and pages count within each data group.
        scale, window, softcap, sinks_N: see ``paged_attention_reference``.
        partition: the model's mesh and rules.

    Returns:
        (out_BTNH, the arrays of the cache ...).
    """
    attend = native_attention.attention if uses_native(partition) else functools.partial(_append_and_attend, device=device_of(partition.device))
    cache_axes = (CACHE_AXES, CACHE_AXES, SCALE_AXES, SCALE_AXES)[:len(cache_kv)]
    table_arrays = () if table is None else tuple(x for x in (table.pages_RL, table.rows) if x is not None)
    table_axes, (sinks, sink_axes) = tuple((BATCH, None)[:x.ndim] for x in table_arrays), _optional(sinks_N, HEAD_AXES)
    num_cache, num_table = len(cache_kv), len(table_arrays)

    def on_shard(q, new_k, new_v, positions, cos, sin, *rest):
        cache, own_table, sinks = rest[:num_cache], rest[num_cache:num_cache + num_table], rest[num_cache + num_table:]
        return attend(q, (new_k, new_v), cache, positions, rope=(cos, sin), table=PageTable(*own_table) if own_table else None, scale=scale,
                      window=window, softcap=softcap, sinks_N=(*sinks, None)[0])
    in_axes = (QUERY_AXES, NEW_KV_AXES, NEW_KV_AXES, POSITION_AXES, ROPE_AXES, ROPE_AXES, *cache_axes, *table_axes, *sink_axes)
    arguments = (q_BTNH, *new_kv, positions_BT, *rope, *cache_kv, *table_arrays, *sinks)
    in_specs, out_specs = (tuple(map(partition.spec, axes)) for axes in (in_axes, (QUERY_AXES, *cache_axes)))
    return partition.shard_map(on_shard, in_specs, out_specs)(*arguments)


def has_scales(cache_dtype) -> bool:
    """Whether keys and values of this dtype have a scale for each head and token."""
    return jnp.dtype(cache_dtype) in native_attention.SCALED_DTYPES


def _append_and_attend(q, new_kv, cache, positions, *, rope, table, device, **attention_options):
    keys_and_values, scales, steps = (rope_reference(new_kv[0], *rope), new_kv[1]), cache[2:], ()
    if scales:
        keys_and_values, steps = zip(*(quantize_entries(x, cache[0].dtype) for x in keys_and_values), strict=True)
    keys_and_values = _kv_append(cache[:2], keys_and_values, positions, device=device, table=table)
    scales = tuple(kv_append_reference(old[..., None], entries[..., None], positions, table).reshape(old.shape)
                   for old, entries in zip(scales, steps, strict=True))
    out = _paged_attention(rope_reference(q, *rope), *keys_and_values, positions, scales=scales or None, table=table, device=device,
                           **attention_options)
    return out, *keys_and_values, *scales


def rms_norm(x_D: jax.Array, weight_D: jax.Array, *, eps: float, partition: Partition, offset: float = 0.0,
             axes: tuple[str | None, ...] = HIDDEN_AXES) -> jax.Array:
    """Normalize the last dim; see ``rms_norm_reference``.

    Args:
        x_D, weight_D, eps: see there.
        partition: the model's mesh and rules.
        offset: is added to the weight, in float32.
        axes: the logical axes of ``x_D``; the mesh may cut the last dim.
    """
    return _norm(x_D, None, weight_D, eps=eps, offset=offset, partition=partition, axes=axes)[0]


def add_rms_norm(x_BTD: jax.Array, delta_BTD: jax.Array, weight_D: jax.Array, *, eps: float, partition: Partition,
                 offset: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """(normalized sum, sum) of the residual stream and what a layer adds to it."""
    return _norm(x_BTD, delta_BTD, weight_D, eps=eps, offset=offset, partition=partition, axes=HIDDEN_AXES)


def layer_norm(x_BTD: jax.Array, weight_D: jax.Array, bias_D: jax.Array, *, eps: float, partition: Partition,
               offset: float = 0.0) -> jax.Array:
    """Center and normalize the last dim; see ``layer_norm_reference`` and :func:`rms_norm`."""
    if not uses_native(partition):
        return layer_norm_reference(x_BTD, _shifted(weight_D, offset), bias_D, eps=eps)
    x32_BTD = x_BTD.astype(jnp.float32)
    centered_BTD = x32_BTD - row_sums(x32_BTD, HIDDEN_AXES, partition)[..., None] / x_BTD.shape[-1]
    normed_BTD = rms_norm(centered_BTD, weight_D, eps=eps, partition=partition, offset=offset)
    return (normed_BTD + bias_D.astype(jnp.float32)).astype(x_BTD.dtype)


def _shifted(weight_D: jax.Array, offset: float) -> jax.Array:
    return weight_D.astype(jnp.float32) + offset if offset else weight_D


def _norm(x, delta, weight, *, eps, offset, partition, axes):
    weight = _shifted(weight, offset)
    if not uses_native(partition):
        total = x if delta is None else x + delta
        return rms_norm_reference(total, weight, eps=eps), total
    if partition.size(axes[-1]) > 1:
        return _norm_of_cut_dim(x, weight, eps=eps, partition=partition, axes=axes), x
    spec, weight_spec, norm = partition.spec(axes), partition.spec(axes[-1:]), functools.partial(_native_norm, eps)
    if delta is None:
        return partition.shard_map(norm, (spec, weight_spec), spec)(x, weight), x
    return partition.shard_map(norm, (spec, weight_spec, spec), (spec, spec))(x, weight, delta)


def _norm_of_cut_dim(x_D, weight_D, *, eps, partition, axes):
    x32_D = x_D.astype(jnp.float32)
    mean_square = row_sums(jnp.square(x32_D), axes, partition)[..., None] / x_D.shape[-1]
    return (x32_D / jnp.sqrt(mean_square + eps) * weight_D.astype(jnp.float32)).astype(x_D.dtype)


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


def vocab_sums(x_BV: jax.Array, partition: Partition) -> jax.Array:
    """[B, ...]: sums over the vocabulary, the last dim; see :func:`row_sums`."""
    return row_sums(x_BV, (BATCH, *(None,) * (x_BV.ndim - 2), VOCAB), partition)


def row_sums(x_D: jax.Array, axes: tuple[str | None, ...], partition: Partition) -> jax.Array:
    """[...]: float32 sums over the last dim; on native kernels a row's has the same bits at any number of rows.

    Args:
        x_D: [..., D], float32.
        axes: its logical axes.
        partition: the model's mesh and rules.
    """
    if not uses_native(partition):
        return jnp.sum(x_D, axis=-1)

    def add_up(x):
        return partition.sum_shards(_native_row_sums(x), axes[-1])
    return partition.shard_map(add_up, (partition.spec(axes),), partition.spec(axes[:-1]))(x_D)


@jax.custom_vjp
def _native_row_sums(x):
    return native_attention.row_sums(x)


_native_row_sums.defvjp(lambda x: (_native_row_sums(x), x), lambda x, gradient: (jnp.broadcast_to(gradient[..., None], x.shape),))
