"""The decoder as a pure function of its parameters, tokens and cache."""
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.flash_attention import soft_cap
from pallas_kernels.page_table import PageTable
from sharding_rules.axes import BATCH, VOCAB
from tpllm import ops
from tpllm.model.attention import attention
from tpllm.model.config import ModelConfig
from tpllm.model.kv_cache import KVCache
from tpllm.model.mlp import mlp, moe
from tpllm.model.params import DecoderParams, LayerParams, MoeParams
from tpllm.model.rope import rope_tables
from tpllm.weights.linear import linear, lookup


@struct.dataclass
class Stream:
    """The residual stream between two layers.

    Attributes:
        x: [B, T, D].
        delta: [B, T, D], what is still to be added to it: the next norm does that; None before the first layer.
    """

    x: jax.Array
    delta: jax.Array | None = None


def forward(params: DecoderParams, tokens_BT: jax.Array, positions_BT: jax.Array, cache: KVCache | None, config: ModelConfig, *,
            tables: Mapping[str, PageTable] | None = None, prompt_lens: jax.Array | None = None,
            output: Literal["logits", "hidden"] = "logits") -> tuple[jax.Array, KVCache | None]:
    """Run the decoder over some tokens of some rows: :func:`.embed`, :func:`.run_layers` and :func:`.finish`.

    Args:
        params: from ``load_model`` or ``init_params``; activations take the norms' dtype.
        tokens_BT: int32 token ids.
        positions_BT: int32 absolute positions, consecutive within a row; negative marks padding at a row's end.
        cache, config, tables, prompt_lens: see :func:`.run_layers`.
        output: ``"logits"``, or ``"hidden"`` for the normalized hidden states, which :func:`.unembed` turns into logits.

    Returns:
        ([B, T, V] float32 logits, padding of the vocabulary at -inf, or [B, T, D] hidden states; the updated cache or None).
    """
    stream, cache = run_layers(params, embed(params, tokens_BT, config), positions_BT, cache, config, tables=tables, prompt_lens=prompt_lens)
    hidden_BTD = finish(params, stream, config)
    return (unembed(params, hidden_BTD, config) if output == "logits" else hidden_BTD), cache


def embed(params: DecoderParams, tokens_BT: jax.Array, config: ModelConfig) -> Stream:
    """The stream before the first layer, of int32 token ids."""
    x_BTD = _constrain_hidden(lookup(tokens_BT, params.embed, params.dtype), config)
    return Stream(x_BTD if config.embedding_multiplier == 1 else x_BTD * jnp.asarray(config.embedding_multiplier, x_BTD.dtype))


def run_layers(params: DecoderParams, stream: Stream, positions_BT: jax.Array, cache: KVCache | None, config: ModelConfig, *, first: int = 0,
               last: int | None = None, tables: Mapping[str, PageTable] | None = None,
               prompt_lens: jax.Array | None = None) -> tuple[Stream, KVCache | None]:
    """Run layers ``first`` to ``last``, that one not included.

    Args:
        params, config: the model, or the part of it that a stage has (see :meth:`.ModelConfig.slice`); layers count from its first one.
        stream: what the layer before gave.
        positions_BT: int32 absolute positions; see ``forward``.
        cache: keys and values of the rows so far, or None: then tokens see only this call's.
        first, last: all layers by default.
        tables: where the rows' tokens lie in a paged cache, for each of ``config.layer_groups``; None where batch row b is page b.
        prompt_lens: int32 [B], or [B, T] for tokens of several rows; read by dynamic and longrope rope only; by default the last position of
            this call plus one.

    Returns:
        (the stream after the last one, the cache with these layers' keys and values or None).
    """
    if prompt_lens is None:
        prompt_lens = jnp.max(positions_BT, axis=-1) + 1
    layers = range(config.num_layers)[first:last]
    ropes = {rope: rope_tables(positions_BT, prompt_lens, head_dim=config.head_dim, rope=rope)
             for rope in dict.fromkeys(config.layer_ropes[index] for index in layers)}
    of_layers = [] if cache is None else [cache.layer(index) for index in range(config.num_layers)]
    for index in layers:
        cache_kv = None if cache is None else of_layers[index]
        stream, cache_kv = _block(stream, params.layers[index], config, rope_BTR=ropes[config.layer_ropes[index]], positions_BT=positions_BT,
                                  cache_kv=cache_kv, table=tables and tables[config.layer_groups[index]], window=config.layer_windows[index])
        if cache is not None:
            of_layers[index] = cache_kv
    return stream, None if cache is None else KVCache.of_layers(of_layers)


def finish(params: DecoderParams, stream: Stream, config: ModelConfig) -> jax.Array:
    """[B, T, D] normalized hidden states after some layer: of the last one, or of an earlier one that the model's head is to read."""
    return _add_and_norm(stream.x, stream.delta, (params.final_norm, params.final_norm_bias), config)[0]


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
    logits_V = soft_cap(logits_V if config.logit_scale == 1 else logits_V * config.logit_scale, config.logit_softcap)
    logits_V = config.partition.constrain(logits_V, (BATCH, *(None,) * (hidden_D.ndim - 2), VOCAB))
    if config.padded_vocab_size > config.vocab_size:
        logits_V = jnp.where(jnp.arange(config.padded_vocab_size) < config.vocab_size, logits_V, -jnp.inf)
    return logits_V


def _block(stream: Stream, layer: LayerParams, config: ModelConfig, *, positions_BT: jax.Array,
           **attention_options: Any) -> tuple[Stream, tuple | None]:
    """Attention and MLP."""
    normed_BTD, x_BTD = _add_and_norm(stream.x, stream.delta, (layer.attn_norm, layer.attn_norm_bias), config)
    attn_BTD, cache_kv = attention(normed_BTD, layer.attn, config, positions_BT=positions_BT, **attention_options)
    normed_BTD, x_BTD = _add_and_norm(x_BTD, _delta(attn_BTD, layer.attn_post_norm, config), (layer.mlp_norm, layer.mlp_norm_bias), config)
    is_sparse = isinstance(layer.mlp, MoeParams)
    mlp_BTD = moe(normed_BTD, layer.mlp, config, positions_BT=positions_BT) if is_sparse else mlp(normed_BTD, layer.mlp, config)
    return Stream(x_BTD, _delta(mlp_BTD, layer.mlp_post_norm, config)), cache_kv


def _add_and_norm(x_BTD: jax.Array, delta_BTD: jax.Array | None, weight_and_bias: tuple[jax.Array | None, jax.Array | None],
                  config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """(normalized sum, sum); where there is no weight, the sum as it is."""
    (weight_D, bias_D), options = weight_and_bias, _norm_options(config)
    if delta_BTD is not None and weight_D is not None and bias_D is None:
        return ops.add_rms_norm(x_BTD, delta_BTD, weight_D, **options)
    x_BTD = x_BTD if delta_BTD is None else x_BTD + delta_BTD
    if weight_D is None:
        return x_BTD, x_BTD
    return (ops.rms_norm(x_BTD, weight_D, **options) if bias_D is None else ops.layer_norm(x_BTD, weight_D, bias_D, **options)), x_BTD


def _delta(out_BTD: jax.Array, post_norm_D: jax.Array | None, config: ModelConfig) -> jax.Array:
    """What the residual stream gets of a sublayer's output."""
    out_BTD = _constrain_hidden(out_BTD, config)
    if post_norm_D is not None:
        out_BTD = ops.rms_norm(out_BTD, post_norm_D, **_norm_options(config))
    multiplier = config.residual_multiplier
    return out_BTD if multiplier == 1 else (out_BTD.astype(jnp.float32) * multiplier).astype(out_BTD.dtype)


def _norm_options(config: ModelConfig) -> dict:
    return {"eps": config.norm_eps, "offset": config.norm_offset, "partition": config.partition}


def _constrain_hidden(x_BTD: jax.Array, config: ModelConfig) -> jax.Array:
    return config.partition.constrain(x_BTD, (BATCH, None, None))
