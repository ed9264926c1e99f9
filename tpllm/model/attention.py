"""The attention layer: projections, biases, query and key norms, rope, and attention with or without a cache."""
import math

import jax
import jax.numpy as jnp

from pallas_kernels.page_table import PageTable
from sharding_rules.axes import BATCH, HEAD_DIM, HEADS, KV_HEADS
from tpllm import ops
from tpllm.model.config import ModelConfig
from tpllm.model.params import AttentionParams
from tpllm.weights.linear import linear, linears


def attention(x_BTD: jax.Array, params: AttentionParams, config: ModelConfig, rope_BTR: tuple[jax.Array, jax.Array], *,
              positions_BT: jax.Array, cache_kv: tuple[jax.Array, ...] | None, table: PageTable | None,
              window: int | None) -> tuple[jax.Array, tuple[jax.Array, ...] | None]:
    """One attention layer.

    Args:
        x_BTD: normalized hidden states.
        params, config: this layer's parameters, the model's features.
        rope_BTR: (cos, sin) of the dims that this layer rotates.
        positions_BT, table, window: see ``ops.cached_attention``.
        cache_kv: this layer's arrays, as ``KVCache.layer`` gives them, or None to attend within the call only.

    Returns:
        ([B, T, D], the updated cache or None).
    """
    q_BTNH, k_BTKH, v_BTKH = _project(x_BTD, params, config)
    scale = 1 / math.sqrt(config.head_dim) if config.attention_scale is None else config.attention_scale
    options = {"rope": rope_BTR, "scale": scale, "window": window, "softcap": config.attention_softcap, "partition": config.partition,
               "sinks_N": None if params.sinks is None else params.sinks.astype(jnp.float32)}
    if cache_kv is None:
        out_BTNH = ops.self_attention(q_BTNH, k_BTKH, v_BTKH, positions_BT, **options)
    else:
        out_BTNH, *updated = ops.cached_attention(q_BTNH, (k_BTKH, v_BTKH), cache_kv, positions_BT, table=table, **options)
        cache_kv = tuple(updated)
    out_BTE = out_BTNH.reshape(*x_BTD.shape[:2], -1)
    return linear(out_BTE, params.o, params.o_bias), cache_kv


def _project(x_BTD: jax.Array, params: AttentionParams, config: ModelConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values, split into heads and cut between them; queries and keys normalized where the model does that."""
    constrain = config.partition.constrain

    def norm(y, weight, axes):
        return ops.rms_norm(y, weight, eps=config.norm_eps, offset=config.norm_offset, partition=config.partition, axes=axes)

    def heads(y_BTE, axis, weight=None):
        axes = (BATCH, None, axis)
        if weight is not None and config.qk_norm_spans_heads:
            y_BTE = norm(constrain(y_BTE, axes), weight, axes)
        y_BTNH = constrain(y_BTE.reshape(*x_BTD.shape[:2], -1, config.head_dim), (*axes, None))
        return y_BTNH if weight is None or config.qk_norm_spans_heads else norm(y_BTNH, weight, (*axes, HEAD_DIM))
    q, k, v = linears(x_BTD, (params.q, params.k, params.v), (params.q_bias, params.k_bias, params.v_bias))
    return heads(q, HEADS, params.q_norm), heads(k, KV_HEADS, params.k_norm), heads(v, KV_HEADS)
