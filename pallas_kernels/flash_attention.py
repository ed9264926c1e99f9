"""Causal self-attention over the tokens of one call (no cache): training, and the oracle of the cached path.

    out[t] = softmax_s(cap(scale * q[t] . k[s])) v[s],   over s <= t and, with a sliding window W, s > t - W

A sink is one more logit of each softmax, learned for each query head, whose value is zero: it takes weight away (Xiao et al. 2023, arXiv:2309.17453;
as a logit: gpt-oss, OpenAI 2025, arXiv:2508.10925).

Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): query head n reads KV head n // (N / K).
"""
import jax
import jax.numpy as jnp

from pallas_kernels.precision import matmul_precision

MASKED = -1e30  # finite, so that a fully masked row gives no NaN


def flash_attention_reference(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array, *,
                              scale: float, window: int | None = None, softcap: float | None = None,
                              sinks_N: jax.Array | None = None) -> jax.Array:
    """Attention of every token to itself and the tokens before it.

    Args:
        q_BTNH: queries; N is a multiple of K.
        k_BTKH, v_BTKH: keys and values.
        positions_BT: int32 absolute positions; a negative one marks padding, which nothing attends to.
        scale: multiplies the scores (usually 1 / sqrt(H)).
        window: how many latest positions a token sees, itself included; None for all.
        softcap: see :func:`soft_cap`; None for none.
        sinks_N: float32; None for none.

    Returns:
        [B, T, N, H] in the dtype of ``q_BTNH``. Softmax and sums are float32.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    products = {"preferred_element_type": jnp.float32, "precision": matmul_precision(q_BTNH.dtype)}
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BTKH, **products) * scale
    visible_BTS = attention_mask(positions_BT, positions_BT, window)
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], soft_cap(scores_BKGTS, softcap), MASKED)
    if sinks_N is not None:
        sinks_BKGT1 = jnp.broadcast_to(sinks_N.reshape(1, K, N // K, 1, 1), (*scores_BKGTS.shape[:-1], 1))
        scores_BKGTS = jnp.concatenate([scores_BKGTS, sinks_BKGT1], axis=-1)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)[..., :T]
    out_BTKGH = jnp.einsum("bkgts,bskh->btkgh", probs_BKGTS.astype(v_BTKH.dtype), v_BTKH, **products)
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)


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
