"""Attention of new tokens to a KV cache, read in fixed blocks: decode, and chunks of a prefill.

The blocks are visited in order with an online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135):

    m' = max(m, max_s score_s);  l' = l e^(m - m') + sum_s e^(score_s - m');  acc' = acc e^(m - m') + sum_s e^(score_s - m') v_s

Only blocks that some query of the call can see are read. A block that is wholly masked for a row leaves that row's state exactly as it
was (l + 0, acc + 0), so a row's result does not depend, to the bit, on how long its neighbours are.
"""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import MASKED, attention_mask
from pallas_kernels.kv_append import as_bits, from_bits
from pallas_kernels.precision import matmul_precision

BLOCK = 128  # tokens of the cache a step reads


def paged_attention_reference(q_BTNH: jax.Array, k_PKSH: jax.Array, v_PKSH: jax.Array, positions_BT: jax.Array, *,
                              rows_B: jax.Array | None = None, scale: float, window: int | None = None) -> jax.Array:
    """Causal attention of queries to the cached keys of their own row.

    Args:
        q_BTNH: queries.
        k_PKSH, v_PKSH: the cache; entry s of a row is the token at position s; K divides N.
        positions_BT: int32 position of each query; negative marks padding, whose output is meaningless but finite.
        rows_B: int32 cache row of each batch row; None where batch row b is cache row b.
        scale: multiplies the scores.
        window: how many latest positions a query sees; None for all.

    Returns:
        [B, T, N, H] in the dtype of ``q_BTNH``; sums and softmax are float32.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_PKSH.shape[1:3]
    block = min(BLOCK, S)
    precision = matmul_precision(q_BTNH.dtype)
    q_BKMH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * (N // K), H)

    def visit(index, state, caches):
        max_BKM, sum_BKM, acc_BKMH = state
        start = jnp.minimum(index * block, S - block)  # the last block of a cache that is no multiple of it overlaps the one before
        key_positions_1s = (start + jnp.arange(block))[None]
        k_BKsH, v_BKsH = (from_bits(_read_block(cache, rows_B, B, start, block), k_PKSH.dtype) for cache in caches)
        scores = jnp.einsum("bkmh,bksh->bkms", q_BKMH, k_BKsH, preferred_element_type=jnp.float32, precision=precision) * scale
        is_new_1s = key_positions_1s >= index * block
        mask_BTs = attention_mask(positions_BT, jnp.where(is_new_1s, key_positions_1s, -1), window)
        mask = jnp.repeat(mask_BTs, N // K, axis=1)[:, None]
        scores = jnp.where(mask, scores, MASKED)
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

    def attend(*caches):
        return jax.lax.fori_loop(first, last, functools.partial(visit, caches=caches), state)
    _, sum_BKM, acc_BKMH = jax.lax.platform_dependent(k_PKSH, v_PKSH, cpu=lambda *caches: attend(*map(as_bits, caches)), default=attend)
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


def _read_block(cache_PKSH: jax.Array, rows_B: jax.Array | None, batch: int, start: jax.Array, block: int) -> jax.Array:
    """[B, K, block, H] of the cache from position ``start`` on."""
    _, K, _, H = cache_PKSH.shape
    if rows_B is None:
        return jax.lax.dynamic_slice(cache_PKSH, (0, 0, start, 0), (batch, K, block, H))
    if batch == 1:
        return jax.lax.dynamic_slice(cache_PKSH, (rows_B[0], 0, start, 0), (1, K, block, H))
    return jax.vmap(lambda row: jax.lax.dynamic_slice(cache_PKSH, (row, 0, start, 0), (1, K, block, H))[0])(rows_B)
