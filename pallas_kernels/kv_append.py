"""Writing new keys or values into a KV cache, in place where the cache is donated.

    cache[row(b), :, positions[b, t]] = new[b, t]
"""
import jax
import jax.numpy as jnp


def kv_append_reference(cache_PKSH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array, rows_B: jax.Array | None = None) -> jax.Array:
    """One layer's cache with the new entries in it.

    Args:
        cache_PKSH: keys or values; P rows of S positions.
        new_BTKH: what to write; cast to the cache's dtype.
        positions_BT: int32; the tokens of a row are consecutive, padding (negative positions) comes last and writes nothing, and
            ``positions_BT[:, 0] + T <= S``.
        rows_B: int32, the distinct cache row of each batch row; None where batch row b is cache row b.

    Returns:
        [P, K, S, H] in the cache's dtype.
    """
    B, T = positions_BT.shape
    new_BTKH = new_BTKH.astype(cache_PKSH.dtype)
    if B == 1 and T > 1:
        return _write_slice(cache_PKSH, new_BTKH, positions_BT, rows_B)
    rows_B = jnp.arange(B) if rows_B is None else rows_B
    positions_BT = jnp.where(positions_BT < 0, cache_PKSH.shape[2], positions_BT)
    bits = jnp.uint16 if cache_PKSH.dtype.itemsize == 2 else cache_PKSH.dtype  # XLA:CPU would upcast the whole cache for a 16-bit float scatter
    cache_bits, new_bits = (x if x.dtype == bits else jax.lax.bitcast_convert_type(x, bits) for x in (cache_PKSH, new_BTKH))
    cache_bits = cache_bits.at[rows_B[:, None], :, positions_BT].set(new_bits, mode="drop", unique_indices=True)
    return cache_bits if bits == cache_PKSH.dtype else jax.lax.bitcast_convert_type(cache_bits, cache_PKSH.dtype)


def _write_slice(cache_PKSH: jax.Array, new_1TKH: jax.Array, positions_1T: jax.Array, rows_1: jax.Array | None) -> jax.Array:
    new_1KTH = new_1TKH.transpose(0, 2, 1, 3)
    start = (0 if rows_1 is None else rows_1[0], 0, jnp.maximum(positions_1T[0, 0], 0), 0)
    old_1KTH = jax.lax.dynamic_slice(cache_PKSH, start, new_1KTH.shape)
    is_real_1T1 = (positions_1T[0] >= 0)[None, None, :, None]
    return jax.lax.dynamic_update_slice(cache_PKSH, jnp.where(is_real_1T1, new_1KTH, old_1KTH), start)
