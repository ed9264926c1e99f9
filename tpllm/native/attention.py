"""Attention to a KV cache, and the norm, for one shard of heads."""
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.page_table import PageTable
from tpllm.native.library import FLOAT_DTYPES, call

SCALED_DTYPES = (jnp.int8, jnp.float8_e4m3fn)
CACHE_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, *SCALED_DTYPES)


def attention(q_BTNH: jax.Array, new_kv: tuple[jax.Array, jax.Array], cache: tuple[jax.Array, ...], positions_BT: jax.Array, *,
              rope: tuple[jax.Array, jax.Array], table: PageTable | None, scale: float, window: int | None,
              softcap: float | None, sinks_N: jax.Array | None = None) -> tuple[jax.Array, ...]:
    """Rotate queries and keys, append keys and values to the cache, attend to it.

    Args:
        q_BTNH: queries.
        new_kv: (k_BTKH, v_BTKH) of the same tokens.
        cache: (k_PKSH, v_PKSH), and of int8 and float8_e4m3fn ones their float32 scales (k_PKS, v_PKS), one a head and token. It is updated in place.
        positions_BT: int32; negative marks padding, whose output is zeros.
        rope: (cos_BTR, sin_BTR), float32; R is at most H.
        table: where the rows' tokens lie; None where batch row b is page b. Rows of more than one page take pages of a multiple of 16 tokens.
        scale, window: as in ``paged_attention_reference``.
        softcap: scores s become ``softcap * tanh(s / softcap)``; None for none.
        sinks_N: float32, one more logit of each query head's softmax, whose value is zero; None for none.

    Returns:
        (out_BTNH in the queries' dtype, the cache's arrays ...).
    """
    B, T, N, H = q_BTNH.shape
    K = cache[0].shape[1]
    if cache[0].dtype not in CACHE_DTYPES or (cache[0].dtype in SCALED_DTYPES) != (len(cache) == 4):
        raise TypeError(f"a cache of {len(cache)} arrays of {cache[0].dtype}; it holds float32, bfloat16, float16, or int8 or fp8 with scales")
    if cache[1].dtype != cache[0].dtype or any(scales.dtype != jnp.float32 for scales in cache[2:]) or q_BTNH.dtype not in FLOAT_DTYPES:
        raise TypeError(f"queries of {q_BTNH.dtype} and a cache of {', '.join(str(x.dtype) for x in cache)}; queries are float32, bfloat16 or "
                        "float16, keys and values are stored in one dtype, and scales in float32")
    if N % K or any(x.shape != (B, T, K, H) for x in new_kv) or positions_BT.shape != (B, T) or cache[1].shape != cache[0].shape:
        raise ValueError(f"queries {q_BTNH.shape}, keys {new_kv[0].shape}, values {new_kv[1].shape}, positions {positions_BT.shape} and a cache "
                         f"{cache[0].shape}, {cache[1].shape} do not belong together")
    none = jnp.zeros(0, jnp.int32)
    pages, rows = (none, None) if table is None else (table.pages_RL, table.rows)
    if table is not None and (pages.ndim != 2 or (rows is not None and rows.shape not in ((B,), (B, T)))):
        raise ValueError(f"a table of pages {pages.shape} and rows {rows if rows is None else rows.shape} for {B} batch rows of {T} tokens; pages "
                         "are [R, L], rows [B], [B, T] or None")
    arguments = (q_BTNH, *(x.astype(q_BTNH.dtype) for x in new_kv), *rope, positions_BT, none if rows is None else rows, pages,
                 jnp.zeros(0, jnp.float32) if sinks_N is None else sinks_N)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BTNH, *cache)]
    aliases = {len(arguments) + i: 1 + i for i in range(len(cache))}
    return tuple(call("attention", results, *arguments, *cache, aliases=aliases, scale=np.float32(scale), softcap=np.float32(softcap or 0),
                      window=np.int64(window or 0)))


def rms_norm(x_D: jax.Array, weight_D: jax.Array, delta_D: jax.Array | None, *, eps: float) -> tuple[jax.Array, ...]:
    """``(norm(x),)``, or, with a delta of x's shape and dtype, ``(norm(x + delta), x + delta)``; see ``rms_norm_reference``."""
    if x_D.dtype not in FLOAT_DTYPES:
        raise TypeError(f"a norm of {x_D.dtype}; it takes float32, bfloat16 and float16")
    if weight_D.shape != x_D.shape[-1:] or (delta_D is not None and (delta_D.shape, delta_D.dtype) != (x_D.shape, x_D.dtype)):
        raise ValueError(f"a norm of {x_D.dtype} {x_D.shape} takes a weight of its last dim and a delta of its own shape and dtype")
    rows = [x.reshape(-1, x.shape[-1]) for x in (x_D, delta_D) if x is not None]
    results = [jax.ShapeDtypeStruct(rows[0].shape, x_D.dtype)] * len(rows)
    outs = call("rms_norm", results, rows[0], weight_D, *rows[1:], eps=np.float32(eps))
    return tuple(out.reshape(x_D.shape) for out in outs)


def row_sums(x_V: jax.Array) -> jax.Array:
    """[...]: float32 sums over the last dim, each in the same order whatever the other dims."""
    rows = x_V.reshape(-1, x_V.shape[-1])
    return call("row_sums", jax.ShapeDtypeStruct(rows.shape[:1], jnp.float32), rows).reshape(x_V.shape[:-1])
