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
    if B == 1 and T > 1 and not _is_narrow_float(cache_PKSH.dtype):
        return _write_slice(cache_PKSH, new_BTKH, positions_BT, rows_B)
    rows_B = jnp.arange(B) if rows_B is None else rows_B

    def scatter_bits(cache_PKSH, new_BTKH):
        return from_bits(_scatter(as_bits(cache_PKSH), as_bits(new_BTKH), rows_B, positions_BT), cache_PKSH.dtype)
    return jax.lax.platform_dependent(cache_PKSH, new_BTKH, cpu=scatter_bits,
                                      tpu=lambda cache, new: scatter_entries(cache, new, rows_B, positions_BT),
                                      default=lambda cache, new: _scatter(cache, new, rows_B, positions_BT))


def scatter_entries(cache_PKSH: jax.Array, new_BTKH: jax.Array, rows_B: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """:func:`kv_append_reference` for a TPU: the entries are rows of one matrix.

    Into [P, K, S, H] its compiler would scatter in a layout of its own, and copy the whole cache there and back.
    """
    P, K, S, H = cache_PKSH.shape
    entries_BTK = (rows_B[:, None, None] * K + jnp.arange(K)) * S + positions_BT[:, :, None]
    entries_BTK = jnp.where(positions_BT[:, :, None] < 0, P * K * S, entries_BTK)
    cache_EH = cache_PKSH.reshape(P * K * S, H).at[entries_BTK.reshape(-1)].set(new_BTKH.reshape(-1, H), mode="drop", unique_indices=True)
    return cache_EH.reshape(P, K, S, H)


def _scatter(cache_PKSH: jax.Array, new_BTKH: jax.Array, rows_B: jax.Array, positions_BT: jax.Array) -> jax.Array:
    positions_BT = jnp.where(positions_BT < 0, cache_PKSH.shape[2], positions_BT)
    return cache_PKSH.at[rows_B[:, None], :, positions_BT].set(new_BTKH, mode="drop", unique_indices=True)


def as_bits(x: jax.Array) -> jax.Array:
    """``x``, a narrow float array seen as unsigned integers.

    XLA:CPU would upcast a whole 16-bit cache to read or write a slice of it; a TPU would copy the cache for the sake of this view.
    """
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}") if _is_narrow_float(x.dtype) else x


def from_bits(x: jax.Array, dtype) -> jax.Array:
    """The inverse of :func:`as_bits`."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def _write_slice(cache_PKSH: jax.Array, new_1TKH: jax.Array, positions_1T: jax.Array, rows_1: jax.Array | None) -> jax.Array:
    new_1KTH = new_1TKH.transpose(0, 2, 1, 3)
    start = (0 if rows_1 is None else rows_1[0], 0, jnp.maximum(positions_1T[0, 0], 0), 0)
    old_1KTH = jax.lax.dynamic_slice(cache_PKSH, start, new_1KTH.shape)
    is_real_1T1 = (positions_1T[0] >= 0)[None, None, :, None]
    return jax.lax.dynamic_update_slice(cache_PKSH, jnp.where(is_real_1T1, new_1KTH, old_1KTH), start)


def _is_narrow_float(dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
