"""The attention layer: projections, biases, query and key norms, rope, and attention with or without a cache."""
import functools
import math

import jax

from sharding_rules.axes import BATCH, HEADS, KV_HEADS
from tpllm import ops
from tpllm.model.config import ModelConfig
from tpllm.model.params import AttentionParams
from tpllm.quant.linear import linear, linears


def attention(x_BTD: jax.Array, params: AttentionParams, config: ModelConfig, rope_BTH: tuple[jax.Array, jax.Array], *,
              positions_BT: jax.Array, cache_kv: tuple[jax.Array, jax.Array] | None, rows_B: jax.Array | None,
              window: int | None) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """One attention layer.

    Args:
        x_BTD: normalized hidden states.
        params, config: this layer's parameters, the model's features.
        rope_BTH: (cos, sin).
        positions_BT, rows_B, window: see ``ops.cached_attention``.
        cache_kv: this layer's (keys, values), or None to attend within the call only.

    Returns:
        ([B, T, D], the updated cache or None).
    """
    q_BTNH, k_BTKH, v_BTKH = _project(x_BTD, params, config)
    if config.has_qk_norm:
        norm = functools.partial(ops.rms_norm, eps=config.norm_eps, partition=config.partition)
        q_BTNH, k_BTKH = norm(q_BTNH, params.q_norm, axes=ops.QUERY_AXES), norm(k_BTKH, params.k_norm, axes=ops.NEW_KV_AXES)
    options = {"rope": rope_BTH, "scale": 1 / math.sqrt(config.head_dim), "window": window, "partition": config.partition}
    if cache_kv is None:
        out_BTNH = ops.self_attention(q_BTNH, k_BTKH, v_BTKH, positions_BT, **options)
    else:
        out_BTNH, *updated = ops.cached_attention(q_BTNH, (k_BTKH, v_BTKH), cache_kv, positions_BT, rows_B=rows_B, **options)
        cache_kv = tuple(updated)
    out_BTE = out_BTNH.reshape(*x_BTD.shape[:2], -1)
    return linear(out_BTE, params.o, params.o_bias), cache_kv


def _project(x_BTD: jax.Array, params: AttentionParams, config: ModelConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values, split into heads and cut between them."""
    def heads(y, axis):
        y = y.reshape(*x_BTD.shape[:2], -1, config.head_dim)
        return y if config.partition is None else config.partition.constrain(y, (BATCH, None, axis, None))
    q, k, v = linears(x_BTD, (params.q, params.k, params.v), (params.q_bias, params.k_bias, params.v_bias))
    return heads(q, HEADS), heads(k, KV_HEADS), heads(v, KV_HEADS)
