"""The one place that picks an implementation of an op, from the platform of the model's mesh, and lays it on the mesh.

Kernels run inside ``jax.shard_map``, each on its own shard: left to automatic partitioning, XLA would gather what they read.
"""
import jax

from pallas_kernels.flash_attention import flash_attention_reference
from pallas_kernels.kv_append import kv_append_reference
from pallas_kernels.paged_attention import paged_attention_reference
from pallas_kernels.rms_norm import rms_norm_reference
from sharding_rules import Partition
from sharding_rules.axes import BATCH, HEAD_DIM, HEADS, KV_HEADS

rms_norm = rms_norm_reference

QUERY_AXES = (BATCH, None, HEADS, HEAD_DIM)
NEW_KV_AXES = (BATCH, None, KV_HEADS, HEAD_DIM)
CACHE_AXES = (BATCH, KV_HEADS, None, HEAD_DIM)
POSITION_AXES = (BATCH, None)
ROW_AXES = (BATCH,)


def self_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array, *, scale: float,
                   window: int | None, partition: Partition | None) -> jax.Array:
    """Causal attention of a call's tokens to each other; [B, T, N, H]. See ``flash_attention_reference``."""
    def attend(q, k, v, positions):
        return flash_attention_reference(q, k, v, positions, scale=scale, window=window)
    return _on_shards(attend, partition, (QUERY_AXES, NEW_KV_AXES, NEW_KV_AXES, POSITION_AXES), (QUERY_AXES,))(
        q_BTNH, k_BTKH, v_BTKH, positions_BT)


def cached_attention(q_BTNH: jax.Array, new_kv: tuple[jax.Array, jax.Array], cache_kv: tuple[jax.Array, jax.Array],
                     positions_BT: jax.Array, *, rows_B: jax.Array | None, scale: float, window: int | None,
                     partition: Partition | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Append new keys and values to one layer's cache, then attend to it.

    Args:
        q_BTNH: queries.
        new_kv: (k_BTKH, v_BTKH) of the same tokens.
        cache_kv: (k_PKSH, v_PKSH).
        positions_BT: int32; negative marks padding.
        rows_B: int32 cache row of each batch row, or None where they are the same. Under a data axis they count within each data group.
        scale, window: see ``paged_attention_reference``.
        partition: the model's mesh and rules.

    Returns:
        (out_BTNH, k_PKSH, v_PKSH).
    """
    def append_and_attend(q, new_k, new_v, cache_k, cache_v, positions, rows=None):
        cache_k = kv_append_reference(cache_k, new_k, positions, rows)
        cache_v = kv_append_reference(cache_v, new_v, positions, rows)
        return paged_attention_reference(q, cache_k, cache_v, positions, rows_B=rows, scale=scale, window=window), cache_k, cache_v
    arguments = (q_BTNH, *new_kv, *cache_kv, positions_BT)
    in_axes = (QUERY_AXES, NEW_KV_AXES, NEW_KV_AXES, CACHE_AXES, CACHE_AXES, POSITION_AXES)
    if rows_B is not None:
        arguments, in_axes = (*arguments, rows_B), (*in_axes, ROW_AXES)
    return _on_shards(append_and_attend, partition, in_axes, (QUERY_AXES, CACHE_AXES, CACHE_AXES))(*arguments)


def _on_shards(function, partition: Partition | None, in_axes, out_axes):
    """``function`` run by each device on its shard of arrays with these logical axes; as it is where there is no mesh."""
    if partition is None:
        return function
    out_specs = tuple(map(partition.spec, out_axes))
    return jax.shard_map(function, mesh=partition.mesh, in_specs=tuple(map(partition.spec, in_axes)),
                         out_specs=out_specs if len(out_specs) > 1 else out_specs[0], check_vma=False)
