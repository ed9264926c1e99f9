"""The decoder as a pure function of its parameters, tokens and cache."""
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.precision import matmul_precision
from sharding_rules.axes import BATCH, VOCAB
from tpllm import ops
from tpllm.model.attention import attention
from tpllm.model.config import ModelConfig
from tpllm.model.kv_cache import KVCache
from tpllm.model.mlp import gated_mlp
from tpllm.model.params import DecoderParams, LayerParams
from tpllm.model.rope import rope_tables


def forward(params: DecoderParams, tokens_BT: jax.Array, positions_BT: jax.Array, cache: KVCache | None, config: ModelConfig, *,
            rows_B: jax.Array | None = None, prompt_lens_B: jax.Array | None = None,
            output: Literal["logits", "hidden"] = "logits") -> tuple[jax.Array, KVCache | None]:
    """Run the decoder over some tokens of some rows.

    Args:
        params: from ``load_model`` or ``init_params``; activations take the embedding's dtype.
        tokens_BT: int32 token ids.
        positions_BT: int32 absolute positions, consecutive within a row; negative marks padding at a row's end.
        cache: keys and values of the rows so far, or None: then tokens see only this call's.
        config: the model; static.
        rows_B: int32 cache row of each batch row; None where they are the same.
        prompt_lens_B: int32, read by dynamic rope only; by default the last position of this call plus one.
        output: ``"logits"``, or ``"hidden"`` for the normalized hidden states, which :func:`.unembed` turns into logits.

    Returns:
        ([B, T, V] float32 logits, padding of the vocabulary at -inf, or [B, T, D] hidden states; the updated cache or None).
    """
    if prompt_lens_B is None:
        prompt_lens_B = jnp.max(positions_BT, axis=-1) + 1
    x_BTD = _embed(params, tokens_BT, config)
    rope_BTH = rope_tables(positions_BT, prompt_lens_B, head_dim=config.head_dim, rope=config.rope)
    keys, values = [], []
    for index, layer in enumerate(params.layers):
        cache_kv = None if cache is None else (cache.keys[index], cache.values[index])
        x_BTD, cache_kv = _block(x_BTD, layer, config, rope_BTH, positions_BT=positions_BT, cache_kv=cache_kv, rows_B=rows_B,
                                 window=config.layer_windows[index])
        if cache_kv is not None:
            keys.append(cache_kv[0])
            values.append(cache_kv[1])
    hidden_BTD = ops.rms_norm(x_BTD, params.final_norm, eps=config.norm_eps)
    cache = None if cache is None else KVCache(keys=tuple(keys), values=tuple(values))
    return (unembed(params, hidden_BTD, config) if output == "logits" else hidden_BTD), cache


def unembed(params: DecoderParams, hidden_D: jax.Array, config: ModelConfig) -> jax.Array:
    """Logits of normalized hidden states.

    Args:
        params, config: the model.
        hidden_D: [..., D].

    Returns:
        [..., V] float32, split over the vocabulary; ids from ``config.vocab_size`` on are padding and hold -inf.
    """
    head_VD = params.embed if params.head is None else params.head
    logits_V = jax.lax.dot_general(hidden_D, head_VD.astype(hidden_D.dtype), (((hidden_D.ndim - 1,), (1,)), ((), ())),
                                   precision=matmul_precision(hidden_D.dtype), preferred_element_type=jnp.float32)
    if config.partition is not None:
        logits_V = config.partition.constrain(logits_V, (BATCH, *(None,) * (hidden_D.ndim - 2), VOCAB))
    if config.padded_vocab_size > config.vocab_size:
        logits_V = jnp.where(jnp.arange(config.padded_vocab_size) < config.vocab_size, logits_V, -jnp.inf)
    return logits_V


def _embed(params: DecoderParams, tokens_BT: jax.Array, config: ModelConfig) -> jax.Array:
    x_BTD = params.embed.at[tokens_BT].get(mode="clip")
    return _constrain_hidden(x_BTD, config)


def _block(x_BTD: jax.Array, layer: LayerParams, config: ModelConfig, rope_BTH, **where) -> tuple[jax.Array, tuple | None]:
    """Pre-norm attention and MLP, each added to the residual stream."""
    attn_BTD, cache_kv = attention(ops.rms_norm(x_BTD, layer.attn_norm, eps=config.norm_eps), layer.attn, config, rope_BTH, **where)
    x_BTD = _constrain_hidden(x_BTD + attn_BTD, config)
    mlp_BTD = gated_mlp(ops.rms_norm(x_BTD, layer.mlp_norm, eps=config.norm_eps), layer.mlp, config)
    return _constrain_hidden(x_BTD + mlp_BTD, config), cache_kv


def _constrain_hidden(x_BTD: jax.Array, config: ModelConfig) -> jax.Array:
    return x_BTD if config.partition is None else config.partition.constrain(x_BTD, (BATCH, None, None))
