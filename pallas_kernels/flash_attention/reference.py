"""Causal attention of the tokens of one call (no cache): training, prefill, and the oracle of the cached path.

    out[t] = softmax_s(cap(scale * q[t] . k[s])) v[s],   over s <= t and, with a sliding window W, s > t - W

A sink is one more logit of each softmax, learned for each query head, whose value is zero: it takes weight away (Xiao et al. 2023, arXiv:2309.17453;
as a logit: gpt-oss, OpenAI 2025, arXiv:2508.10925).

Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): query head n reads KV head n // (N / K).
"""
import math

import jax
import jax.numpy as jnp

from pallas_kernels.precision import matmul_precision

MASKED = -1e30  # finite, so that a fully masked row gives no NaN
LOG2_E = math.log2(math.e)  # of kernels, whose softmax is one in base 2


def flash_attention_reference(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, positions_BT: jax.Array, *,
                              scale: float, window: int | None = None, softcap: float | None = None, sinks_N: jax.Array | None = None,
                              key_positions_BS: jax.Array | None = None, segments_BT: jax.Array | None = None,
                              key_segments_BS: jax.Array | None = None, returns_lse: bool = False) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of every token to itself and the tokens before it.

    Args:
        q_BTNH: queries; N is a multiple of K.
        k_BSKH, v_BSKH: keys and values.
        positions_BT: int32 absolute positions; a negative one marks padding, which nothing attends to.
        scale: multiplies the scores (usually 1 / sqrt(H)).
        window: how many latest positions a token sees, itself included; None for all.
        softcap: see :func:`soft_cap`; None for none.
        sinks_N: float32; None for none.
        key_positions_BS: int32 positions of the keys, as of a later chunk of a prefill; None where they are the queries' own.
        segments_BT: int32, at least 0: texts packed into one row; a token sees its own text only. None where a row is one text.
        key_segments_BS: those of the keys; None where they are the queries' own.
        returns_lse: whether the logarithm of each softmax's denominator is returned too.

    Returns:
        [B, T, N, H] in the dtype of ``q_BTNH``, zero for a token that sees no key. Softmax and sums are float32. With ``returns_lse`` also
        float32 [B, N, T], ``MASKED`` where no key is seen and there is no sink.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    products = {"preferred_element_type": jnp.float32, "precision": matmul_precision(q_BTNH.dtype)}
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, **products) * scale
    visible_BTS = attention_mask(positions_BT, positions_BT if key_positions_BS is None else key_positions_BS, window)
    if segments_BT is not None:
        visible_BTS &= segments_BT[:, :, None] == (segments_BT if key_segments_BS is None else key_segments_BS)[:, None, :]
    visible = visible_BTS[:, None, None]
    scores_BKGTS = jnp.where(visible, soft_cap(scores_BKGTS, softcap), MASKED)
    max_BKGT1 = scores_BKGTS.max(-1, keepdims=True)
    if sinks_N is not None:
        sinks_1KG11 = sinks_N.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
        max_BKGT1 = jnp.maximum(max_BKGT1, sinks_1KG11)
    max_BKGT1 = jax.lax.stop_gradient(max_BKGT1)
    weights_BKGTS = jnp.where(visible, jnp.exp(scores_BKGTS - max_BKGT1), 0)
    sums_BKGT1 = weights_BKGTS.sum(-1, keepdims=True)
    if sinks_N is not None:
        sums_BKGT1 += jnp.exp(sinks_1KG11 - max_BKGT1)
    sums_BKGT1 = jnp.where(sums_BKGT1 == 0, 1, sums_BKGT1)
    probs_BKGTS = weights_BKGTS / sums_BKGT1
    out_BTKGH = jnp.einsum("bkgts,bskh->btkgh", probs_BKGTS.astype(v_BSKH.dtype), v_BSKH, **products)
    out_BTNH = out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)
    if not returns_lse:
        return out_BTNH
    return out_BTNH, (max_BKGT1 + jnp.log(sums_BKGT1)).reshape(B, N, T)


def soft_cap(x: jax.Array, softcap: float | None) -> jax.Array:
    """``softcap * tanh(x / softcap)``: nearly x where it is small, never beyond the cap (Gemma 2 report, arXiv:2408.00118); None for x."""
    return x if softcap is None else softcap * jnp.tanh(x / softcap)


def attention_mask(query_positions_BT: jax.Array, key_positions_BS: jax.Array, window: int | None) -> jax.Array:
    """[B, T, S] bool: which keys a query sees. Keys at negative positions are seen by none."""
    query_BT1, key_B1S = query_positions_BT[:, :, None], key_positions_BS[:, None, :]
    visible_BTS = (key_B1S <= query_BT1) & (key_B1S >= 0)
    if window is not None:
        visible_BTS &= key_B1S > query_BT1 - window
    return visible_BTS
