"""Writing new keys or values into a KV cache, in place where the cache is donated.

    cache[page(b, t), :, positions[b, t] % S] = new[b, t],   page from the table
"""
import jax
import jax.numpy as jnp

from pallas_kernels.page_table import PageTable, one_page_a_row


def kv_append_reference(cache_PKSH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array, table: PageTable | None = None) -> jax.Array:
    """One layer's cache with the new entries in it.

    Args:
        cache_PKSH: keys or values; P pages of S tokens.
        new_BTKH: what to write; cast to the cache's dtype.
        positions_BT: int32, distinct within a row; negative marks padding, which writes nothing, and so does what has no page.
        table: where the rows' tokens lie; None where batch row b is page b.

    Returns:
        [P, K, S, H] in the cache's dtype.
    """
    P, _, S, _ = cache_PKSH.shape
    pages_BT = (one_page_a_row(positions_BT.shape[0]) if table is None else table).pages_of(positions_BT, S)
    pages_BT = jnp.where((pages_BT < 0) | (pages_BT >= P), P, pages_BT)  # out of bounds is dropped; a far one would wrap in scatter_entries
    offsets_BT = positions_BT % S
    new_BTKH = new_BTKH.astype(cache_PKSH.dtype)

    def scatter_bits(cache_PKSH, new_BTKH):
        return from_bits(_scatter(as_bits(cache_PKSH), as_bits(new_BTKH), pages_BT, offsets_BT), cache_PKSH.dtype)
    return jax.lax.platform_dependent(cache_PKSH, new_BTKH, cpu=scatter_bits,
                                      tpu=lambda cache, new: scatter_entries(cache, new, pages_BT, offsets_BT),
                                      default=lambda cache, new: _scatter(cache, new, pages_BT, offsets_BT))


def quantize_entries(new_BTKH: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """Keys or values for a cache of int8 or float8_e4m3fn, one scale a head and token: the largest magnitude over the largest code.

    Args:
        new_BTKH: floats.
        dtype: of the cache.

    Returns:
        (codes [B, T, K, H], scales float32 [B, T, K]).
    """
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    largest = 127.0 if is_integer else float(jnp.finfo(dtype).max)
    x = new_BTKH.astype(jnp.float32)
    most_BTK = jnp.max(jnp.abs(x), axis=-1)
    inverse_BTK = jnp.where(most_BTK > 0, largest / jnp.where(most_BTK > 0, most_BTK, 1.0), 0.0)
    scaled = jnp.clip(x * inverse_BTK[..., None], -largest, largest)
    return (jnp.round(scaled) if is_integer else scaled).astype(dtype), most_BTK / largest


def scatter_entries(cache_PKSH: jax.Array, new_BTKH: jax.Array, pages_BT: jax.Array, offsets_BT: jax.Array) -> jax.Array:
    """:func:`kv_append_reference` for a TPU: the entries are rows of one matrix.

    Into [P, K, S, H] its compiler would scatter in a layout of its own, and copy the whole cache there and back.
    """
    P, K, S, H = cache_PKSH.shape
    entries_BTK = (pages_BT[:, :, None] * K + jnp.arange(K)) * S + offsets_BT[:, :, None]
    cache_EH = cache_PKSH.reshape(P * K * S, H).at[entries_BTK.reshape(-1)].set(new_BTKH.reshape(-1, H), mode="drop", unique_indices=True)
    return cache_EH.reshape(P, K, S, H)


def _scatter(cache_PKSH: jax.Array, new_BTKH: jax.Array, pages_BT: jax.Array, offsets_BT: jax.Array) -> jax.Array:
    return cache_PKSH.at[pages_BT, :, offsets_BT].set(new_BTKH, mode="drop", unique_indices=True)


def as_bits(x: jax.Array) -> jax.Array:
    """``x``, a narrow float array seen as unsigned integers.

    XLA:CPU would upcast a whole 16-bit cache to read or write a slice of it; a TPU would copy the cache for the sake of this view.
    """
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}") if _is_narrow_float(x.dtype) else x


def from_bits(x: jax.Array, dtype) -> jax.Array:
    """The inverse of :func:`as_bits`."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def _is_narrow_float(dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
