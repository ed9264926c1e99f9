"""The decoder as a pure function of its parameters, tokens and cache."""
from typing import Literal

import jax
import jax.numpy as jnp

from sharding_rules.axes import BATCH, VOCAB
from tpllm import ops
from tpllm.model.attention import attention
from tpllm.model.config import ModelConfig
from tpllm.model.kv_cache import KVCache
from tpllm.model.mlp import gated_mlp
from tpllm.model.params import DecoderParams, LayerParams
from tpllm.model.rope import rope_tables
from tpllm.quant.linear import linear, lookup


def forward(params: DecoderParams, tokens_BT: jax.Array, positions_BT: jax.Array, cache: KVCache | None, config: ModelConfig, *,
            rows_B: jax.Array | None = None, prompt_lens_B: jax.Array | None = None,
            output: Literal["logits", "hidden"] = "logits") -> tuple[jax.Array, KVCache | None]:
    """Run the decoder over some tokens of some rows.

    Args:
        params: from ``load_model`` or ``init_params``; activations take the norms' dtype.
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
    x_BTD = _constrain_hidden(lookup(tokens_BT, params.embed, params.dtype), config)
    rope_BTH = rope_tables(positions_BT, prompt_lens_B, head_dim=config.head_dim, rope=config.rope)
    keys, values, delta_BTD = [], [], None
    for index, layer in enumerate(params.layers):
        cache_kv = None if cache is None else (cache.keys[index], cache.values[index])
        x_BTD, delta_BTD, cache_kv = _block(x_BTD, delta_BTD, layer, config, rope_BTH, positions_BT=positions_BT, cache_kv=cache_kv, rows_B=rows_B,
                                 window=config.layer_windows[index])
        if cache_kv is not None:
            keys.append(cache_kv[0])
            values.append(cache_kv[1])
    hidden_BTD, _ = _add_and_norm(x_BTD, delta_BTD, params.final_norm, config)
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
    logits_V = linear(hidden_D, head_VD, dtype=jnp.float32)
    if config.partition is not None:
        logits_V = config.partition.constrain(logits_V, (BATCH, *(None,) * (hidden_D.ndim - 2), VOCAB))
    if config.padded_vocab_size > config.vocab_size:
        logits_V = jnp.where(jnp.arange(config.padded_vocab_size) < config.vocab_size, logits_V, -jnp.inf)
    return logits_V


def _block(x_BTD: jax.Array, delta_BTD: jax.Array | None, layer: LayerParams, config: ModelConfig, rope_BTH,
           **where) -> tuple[jax.Array, jax.Array, tuple | None]:
    """Pre-norm attention and MLP. Takes and gives the residual stream and what is still to be added to it: the next norm does that."""
    normed_BTD, x_BTD = _add_and_norm(x_BTD, delta_BTD, layer.attn_norm, config)
    attn_BTD, cache_kv = attention(normed_BTD, layer.attn, config, rope_BTH, **where)
    normed_BTD, x_BTD = _add_and_norm(x_BTD, _constrain_hidden(attn_BTD, config), layer.mlp_norm, config)
    return x_BTD, _constrain_hidden(gated_mlp(normed_BTD, layer.mlp, config), config), cache_kv


def _add_and_norm(x_BTD: jax.Array, delta_BTD: jax.Array | None, weight_D: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """(normalized sum, sum)."""
    options = {"eps": config.norm_eps, "partition": config.partition}
    if delta_BTD is None:
        return ops.rms_norm(x_BTD, weight_D, **options), x_BTD
    return ops.add_rms_norm(x_BTD, delta_BTD, weight_D, **options)


def _constrain_hidden(x_BTD: jax.Array, config: ModelConfig) -> jax.Array:
    return x_BTD if config.partition is None else config.partition.constrain(x_BTD, (BATCH, None, None))
