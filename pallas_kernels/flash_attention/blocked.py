"""Attention in plain ``jax.numpy``, block by block, for any device: its memory is linear in the tokens, and so is that of its gradient.

The forward is an online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867). The gradient computes each block of probabilities again from the
log-sum-exp of the forward (Dao et al. 2022, arXiv:2205.14135):

    P = exp(S - lse);  dV = P^T dO;  dS = P * (dO V^T - delta) * S';  dQ = dS K;  dK = dS^T Q;  delta = sum(dO * O) - dlse

with S' the derivative of the scaled and capped scores. A sink's gradient is the sum of ``-exp(sink - lse) delta``.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.reference import MASKED, soft_cap
from pallas_kernels.flash_attention.spans import Spans, pad
from pallas_kernels.precision import matmul_precision

BLOCK_Q, BLOCK_K = 256, 512


def flash_attention_blocked(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, spans: Spans, sinks_N: jax.Array | None, *, scale: float,
                            softcap: float | None) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BNT) of ``flash_attention_reference``; ``spans`` says which keys each query sees."""
    T = q_BTNH.shape[1]
    by_row = _by_row(q_BTNH, k_BSKH, v_BSKH, spans)
    out_BTNH, lse_BNT = lax.map(lambda row: _attend_row(*row, sinks_N, scale=scale, softcap=softcap), by_row)
    return out_BTNH[:, :T], lse_BNT[:, :, :T]


def flash_attention_gradients(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, spans: Spans, sinks_N: jax.Array | None,
                              results: tuple[jax.Array, jax.Array], gradients: tuple[jax.Array, jax.Array], *, scale: float,
                              softcap: float | None) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of queries, keys, values and sinks.

    Args:
        q_BTNH, k_BSKH, v_BSKH, spans, sinks_N, scale, softcap: of the forward.
        results: its (out_BTNH, lse_BNT).
        gradients: those of ``results``.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    (out_BTNH, lse_BNT), (d_out_BTNH, d_lse_BNT) = results, gradients
    delta_BNT = jnp.einsum("btnh,btnh->bnt", out_BTNH.astype(jnp.float32), d_out_BTNH.astype(jnp.float32)) - d_lse_BNT
    by_row = (*_by_row(q_BTNH, k_BSKH, v_BSKH, spans), pad(d_out_BTNH, BLOCK_Q, 1), pad(lse_BNT, BLOCK_Q, 2), pad(delta_BNT, BLOCK_Q, 2))
    d_q, d_k, d_v = lax.map(lambda row: _gradients_of_row(*row, scale=scale, softcap=softcap), by_row)
    d_sinks_N = None
    if sinks_N is not None:
        d_sinks_N = -(jnp.exp(sinks_N.astype(jnp.float32)[:, None] - lse_BNT) * delta_BNT).sum((0, 2)).astype(sinks_N.dtype)
    return (d_q[:, :T].reshape(q_BTNH.shape).astype(q_BTNH.dtype), d_k[:, :S].astype(k_BSKH.dtype), d_v[:, :S].astype(v_BSKH.dtype), d_sinks_N)


def _by_row(q_BTNH, k_BSKH, v_BSKH, spans):
    q_BTNH, k_BSKH, v_BSKH = pad(q_BTNH, BLOCK_Q, 1), pad(k_BSKH, BLOCK_K, 1), pad(v_BSKH, BLOCK_K, 1)
    spans = spans.pad(q_BTNH.shape[1], k_BSKH.shape[1])
    return q_BTNH, k_BSKH, v_BSKH, spans, spans.blocks(BLOCK_Q, BLOCK_K)


def _block_of(x, index, size: int, dim: int = 0):
    return lax.dynamic_slice_in_dim(x, index * size, size, dim)


def _products(dtype):
    return functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=matmul_precision(dtype))


def _scores(q_qKGH, k_sKH, spans: Spans, tile, block, *, scale, softcap):
    """(scores_KGqs, is_seen_qs) of a block, capped and not masked."""
    scores_KGqs = soft_cap(_products(q_qKGH.dtype)("qkgh,skh->kgqs", q_qKGH, k_sKH) * scale, softcap)
    low_q1, high_q1 = (_block_of(x, tile, BLOCK_Q)[:, None] for x in (spans.low_BT, spans.high_BT))
    ranks_1s = _block_of(spans.ranks_BS, block, BLOCK_K)[None]
    return scores_KGqs, (ranks_1s >= low_q1) & (ranks_1s <= high_q1)


def _attend_row(q_TNH, k_SKH, v_SKH, spans, blocks_Q4, sinks_N, *, scale, softcap):
    (T, N, H), K = q_TNH.shape, k_SKH.shape[1]
    products = _products(q_TNH.dtype)

    def attend(_, tile):
        q_qKGH = _block_of(q_TNH, tile, BLOCK_Q).reshape(BLOCK_Q, K, N // K, H)

        def visit(block, state):
            max_KGq, sum_KGq, acc_KGqH = state
            scores_KGqs, is_seen_qs = _scores(q_qKGH, _block_of(k_SKH, block, BLOCK_K), spans, tile, block, scale=scale, softcap=softcap)
            new_max_KGq = jnp.maximum(max_KGq, jnp.where(is_seen_qs, scores_KGqs, MASKED).max(-1))
            probs_KGqs = jnp.where(is_seen_qs, jnp.exp(scores_KGqs - new_max_KGq[..., None]), 0)
            shrink_KGq = jnp.exp(max_KGq - new_max_KGq)
            added_KGqH = products("kgqs,skh->kgqh", probs_KGqs.astype(v_SKH.dtype), _block_of(v_SKH, block, BLOCK_K))
            return new_max_KGq, sum_KGq * shrink_KGq + probs_KGqs.sum(-1), acc_KGqH * shrink_KGq[..., None] + added_KGqH
        start = (MASKED, 0.0) if sinks_N is None else (sinks_N.astype(jnp.float32).reshape(K, N // K, 1), 1.0)
        state = (*(jnp.broadcast_to(jnp.asarray(x, jnp.float32), (K, N // K, BLOCK_Q)) for x in start), jnp.zeros((K, N // K, BLOCK_Q, H)))
        max_KGq, sum_KGq, acc_KGqH = lax.fori_loop(blocks_Q4[tile, 0], blocks_Q4[tile, 3], visit, state)
        sum_KGq = jnp.where(sum_KGq == 0, 1, sum_KGq)
        out_qNH = (acc_KGqH / sum_KGq[..., None]).transpose(2, 0, 1, 3).reshape(BLOCK_Q, N, H)
        return None, (out_qNH.astype(q_TNH.dtype), (max_KGq + jnp.log(sum_KGq)).reshape(N, BLOCK_Q))
    _, (out_QqNH, lse_QNq) = lax.scan(attend, None, jnp.arange(blocks_Q4.shape[0]))
    return out_QqNH.reshape(T, N, H), lse_QNq.transpose(1, 0, 2).reshape(N, T)


def _gradients_of_row(q_TNH, k_SKH, v_SKH, spans, blocks_Q4, d_out_TNH, lse_NT, delta_NT, *, scale, softcap):
    (_, N, H), (S, K, _) = q_TNH.shape, k_SKH.shape
    products, dtype = _products(q_TNH.dtype), q_TNH.dtype

    def differentiate(d_kv, tile):
        q_qKGH, d_out_qKGH = (_block_of(x, tile, BLOCK_Q).reshape(BLOCK_Q, K, N // K, H) for x in (q_TNH, d_out_TNH.astype(dtype)))
        lse_KGq1, delta_KGq1 = (_block_of(x, tile, BLOCK_Q, 1).reshape(K, N // K, BLOCK_Q, 1) for x in (lse_NT, delta_NT))

        def visit(block, state):
            d_q_qKGH, d_k_SKH, d_v_SKH = state
            k_sKH, v_sKH = _block_of(k_SKH, block, BLOCK_K), _block_of(v_SKH, block, BLOCK_K)
            scores_KGqs, is_seen_qs = _scores(q_qKGH, k_sKH, spans, tile, block, scale=scale, softcap=softcap)
            probs_KGqs = jnp.where(is_seen_qs, jnp.exp(scores_KGqs - lse_KGq1), 0)
            slope_KGqs = scale if softcap is None else scale * (1 - jnp.square(scores_KGqs / softcap))
            d_scores_KGqs = probs_KGqs * (products("qkgh,skh->kgqs", d_out_qKGH, v_sKH) - delta_KGq1) * slope_KGqs
            d_scores_KGqs, probs_KGqs = d_scores_KGqs.astype(dtype), probs_KGqs.astype(dtype)
            d_k_SKH = _add_block(d_k_SKH, products("kgqs,qkgh->skh", d_scores_KGqs, q_qKGH), block)
            d_v_SKH = _add_block(d_v_SKH, products("kgqs,qkgh->skh", probs_KGqs, d_out_qKGH), block)
            return d_q_qKGH + products("kgqs,skh->qkgh", d_scores_KGqs, k_sKH), d_k_SKH, d_v_SKH
        d_q_qKGH, *d_kv = lax.fori_loop(blocks_Q4[tile, 0], blocks_Q4[tile, 3], visit, (jnp.zeros(q_qKGH.shape), *d_kv))
        return tuple(d_kv), d_q_qKGH
    zeros = jnp.zeros((S, K, H))
    (d_k_SKH, d_v_SKH), d_q_QqKGH = lax.scan(differentiate, (zeros, zeros), jnp.arange(blocks_Q4.shape[0]))
    return d_q_QqKGH.reshape(q_TNH.shape), d_k_SKH, d_v_SKH


def _add_block(x_SKH, added_sKH, block):
    return lax.dynamic_update_slice_in_dim(x_SKH, _block_of(x_SKH, block, BLOCK_K) + added_sKH, block * BLOCK_K, 0)
