"""Attention of new tokens to a KV cache, read in fixed blocks: decode, and chunks of a prefill.

The blocks are visited in order with an online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135):

    m' = max(m, max_s score_s);  l' = l e^(m - m') + sum_s e^(score_s - m');  acc' = acc e^(m - m') + sum_s e^(score_s - m') v_s

Only blocks that some query of the call can see are read. A block that is wholly masked for a row leaves that row's state exactly as it
was (l + 0, acc + 0), so a row's result does not depend, to the bit, on how long its neighbours are.
"""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import MASKED, attention_mask, soft_cap
from pallas_kernels.kv_append import as_bits, from_bits
from pallas_kernels.page_table import PageTable, one_page_a_row
from pallas_kernels.precision import matmul_precision

BLOCK = 128  # tokens of the cache a step reads


def paged_attention_reference(q_BTNH: jax.Array, k_PKSH: jax.Array, v_PKSH: jax.Array, positions_BT: jax.Array, *,
                              scales: tuple[jax.Array, jax.Array] | None = None, table: PageTable | None = None, scale: float,
                              window: int | None = None, softcap: float | None = None, sinks_N: jax.Array | None = None) -> jax.Array:
    """Causal attention of queries to the cached keys of their own row.

    Args:
        q_BTNH: queries.
        k_PKSH, v_PKSH: the cache, P pages of S tokens; K divides N.
        positions_BT: int32 position of each query; negative marks padding, whose output is meaningless but finite.
        scales: float32 [P, K, S] that multiply keys and values; None for none.
        table: where the rows' tokens lie; None where batch row b is page b.
        scale: multiplies the scores.
        window: how many latest positions a query sees; None for all.
        softcap: scores s become ``softcap * tanh(s / softcap)``; None for none.
        sinks_N: float32, one more logit of each query head's softmax, whose value is zero; None for none.

    Returns:
        [B, T, N, H] in the dtype of ``q_BTNH``; sums and softmax are float32.
    """
    B, T, N, H = q_BTNH.shape
    table = one_page_a_row(B) if table is None else table
    if table.rows is not None and table.rows.ndim == 2:  # neighbours of different rows share no page
        by_token = paged_attention_reference(q_BTNH.reshape(B * T, 1, N, H), k_PKSH, v_PKSH, positions_BT.reshape(-1, 1), scales=scales,
                                             table=table.by_token(T), scale=scale, window=window, softcap=softcap, sinks_N=sinks_N)
        return by_token.reshape(B, T, N, H)
    K, S = k_PKSH.shape[1:3]
    pages_BL = table.pages_RL[:B] if table.rows is None else table.pages_RL[table.rows]
    L = pages_BL.shape[1]
    block = min(BLOCK, S) if L == 1 else S * min(max(1, BLOCK // S), L)
    precision = matmul_precision(q_BTNH.dtype)
    q_BKMH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * (N // K), H)

    def visit(index, state, caches):
        max_BKM, sum_BKM, acc_BKMH = state
        start = jnp.minimum(index * block, L * S - block)  # the last block of a row that is no multiple of it overlaps the one before
        key_positions_1s = (start + jnp.arange(block))[None]
        k_BKsH, v_BKsH = (from_bits(_read_block(cache, pages_BL, start, block), k_PKSH.dtype) for cache in caches[:2])
        if scales is not None:
            k_BKsH, v_BKsH = ((x.astype(jnp.float32) * _read_block(steps, pages_BL, start, block)).astype(q_BTNH.dtype)
                              for x, steps in zip((k_BKsH, v_BKsH), caches[2:], strict=True))
        scores = jnp.einsum("bkmh,bksh->bkms", q_BKMH, k_BKsH, preferred_element_type=jnp.float32, precision=precision) * scale
        is_new_1s = key_positions_1s >= index * block
        mask_BTs = attention_mask(positions_BT, jnp.where(is_new_1s, key_positions_1s, -1), window)
        mask = jnp.repeat(mask_BTs, N // K, axis=1)[:, None]
        scores = jnp.where(mask, soft_cap(scores, softcap), MASKED)
        new_max = jnp.maximum(max_BKM, scores.max(-1))
        probs = jnp.where(mask, jnp.exp(scores - new_max[..., None]), 0.0)
        v_BKsH = jnp.where(key_positions_1s[:, None, :, None] <= newest_B111, v_BKsH, 0)  # a NaN that an earlier row left there: 0 * NaN
        shrink = jnp.exp(max_BKM - new_max)
        added = jnp.einsum("bkms,bksh->bkmh", probs.astype(v_BKsH.dtype), v_BKsH, preferred_element_type=jnp.float32, precision=precision)
        return new_max, sum_BKM * shrink + probs.sum(-1), acc_BKMH * shrink[..., None] + added

    newest_B111 = jnp.max(positions_BT, axis=1)[:, None, None, None]
    first, last = _visible_blocks(positions_BT, block, window)
    M = T * (N // K)
    state = (jnp.full((B, K, M), MASKED), jnp.zeros((B, K, M)), jnp.zeros((B, K, M, H)))
    if sinks_N is not None:  # the first term of the sums
        sinks_BKM = jnp.broadcast_to(sinks_N.astype(jnp.float32).reshape(1, K, 1, N // K), (B, K, T, N // K)).reshape(B, K, M)
        state = (sinks_BKM, jnp.ones((B, K, M)), state[2])

    def attend(*caches):
        return jax.lax.fori_loop(first, last, functools.partial(visit, caches=caches), state)
    _, sum_BKM, acc_BKMH = jax.lax.platform_dependent(k_PKSH, v_PKSH, *(steps[..., None] for steps in scales or ()),
                                                       cpu=lambda *caches: attend(*map(as_bits, caches)), default=attend)
    out = acc_BKMH / jnp.maximum(sum_BKM, 1e-30)[..., None]
    return out.reshape(B, K, T, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)


def _visible_blocks(positions_BT: jax.Array, block: int, window: int | None) -> tuple[jax.Array, jax.Array]:
    """First and one past the last block that any query of the call sees."""
    last = (jnp.max(positions_BT) + block) // block
    if window is None:
        return jnp.int32(0), last
    far_future = jnp.iinfo(jnp.int32).max
    oldest = jnp.min(jnp.where(positions_BT >= 0, positions_BT, far_future)) - window + 1
    return jnp.clip(oldest // block, 0, last), last


def _read_block(cache_PKSH: jax.Array, pages_BL: jax.Array, start: jax.Array, block: int) -> jax.Array:
    """[B, K, block, H] of the cache from position ``start`` on; what a row has no page for is any other's."""
    (B, L), (_, K, S, H) = pages_BL.shape, cache_PKSH.shape
    pages_BL = jnp.maximum(pages_BL, 0)
    if L == 1 and B == 1:
        return jax.lax.dynamic_slice(cache_PKSH, (pages_BL[0, 0], 0, start, 0), (1, K, block, H))
    if L == 1:
        return jax.vmap(lambda page: jax.lax.dynamic_slice(cache_PKSH, (page, 0, start, 0), (1, K, block, H))[0])(pages_BL[:, 0])
    pages_Bl = jax.lax.dynamic_slice(pages_BL, (0, start // S), (B, block // S))
    return cache_PKSH[pages_Bl].transpose(0, 2, 1, 3, 4).reshape(B, K, block, H)
