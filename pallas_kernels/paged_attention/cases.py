"""What the kernels are tested and measured on."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kv_append import quantize_entries
from pallas_kernels.page_table import PageTable

NUM_STRAY_PAGES = 3  # which belong to no row


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        lengths: tokens of each row, with those of the call; 0 for a row that is padding.
        num_tokens: of each row in the call, the last ones of its length; shorter rows are padded. Of a ragged call a number for each row.
        heads, kv_heads, head_dim, page_size: of the arrays.
        num_parts: pages that the table has room for in a row.
        dtype, cache_dtype: of queries; of keys and values.
        window, softcap: see ``paged_attention_reference``.
        has_sinks: whether heads have sinks.
    """

    lengths: tuple[int, ...]
    num_tokens: int | tuple[int, ...] = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    page_size: int = 32
    num_parts: int = 8
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False

    def __str__(self) -> str:
        return " ".join(f"{field.name}={value}" for field in dataclasses.fields(self) if (value := getattr(self, field.name)) != field.default)

    def arguments(self, seed: int) -> dict:
        """Everything but ``device``. Pages lie in any order; what no row has written is NaN, in a cache of 8 bits its scale is."""
        rng = np.random.default_rng(seed)
        rows, positions = self._rows_and_positions()
        R, L, S = len(self.lengths), self.num_parts, self.page_size
        pages_RL = rng.permutation(R * L + NUM_STRAY_PAGES)[:R * L].reshape(R, L).astype(np.int32)
        position_RA = np.arange(L * S)
        is_written_PS = np.zeros((R * L + NUM_STRAY_PAGES, S), bool)
        is_written_PS[pages_RL] = (position_RA < np.array(self.lengths)[:, None]).reshape(R, L, S)
        pages_RL[np.arange(L) * S >= np.array(self.lengths)[:, None]] = -1
        caches, scales = zip(*(self._cache(rng, is_written_PS) for _ in range(2)), strict=True)
        q_BTNH = jnp.asarray(rng.normal(size=(*positions.shape, self.heads, self.head_dim)), self.dtype)
        sinks_N = jnp.asarray(rng.normal(size=self.heads), jnp.float32) if self.has_sinks else None
        return {"q_BTNH": q_BTNH, "k_PKSH": caches[0], "v_PKSH": caches[1], "positions_BT": jnp.asarray(positions),
                "scales": None if scales[0] is None else scales, "table": PageTable(jnp.asarray(pages_RL), rows), "sinks_N": sinks_N,
                "scale": self.head_dim ** -0.5, "window": self.window, "softcap": self.softcap}

    def _rows_and_positions(self) -> tuple[jax.Array | None, np.ndarray]:
        if isinstance(self.num_tokens, int):
            first = np.maximum(np.array(self.lengths) - self.num_tokens, 0)[:, None]
            positions = first + np.arange(self.num_tokens)
            return None, np.where(positions < np.array(self.lengths)[:, None], positions, -1).astype(np.int32)
        runs = [np.arange(length - count, length) for length, count in zip(self.lengths, self.num_tokens, strict=True)]
        padding = np.full(3, -1)
        rows = [np.full(len(run), row) for row, run in enumerate(runs)] + [np.zeros(3)]
        return jnp.asarray(np.concatenate(rows)[None], jnp.int32), np.concatenate([*runs, padding])[None].astype(np.int32)

    def _cache(self, rng, is_written_PS) -> tuple[jax.Array, jax.Array | None]:
        x_PSKH, dtype = rng.normal(size=(*is_written_PS.shape, self.kv_heads, self.head_dim)).astype(np.float32), jnp.dtype(self.cache_dtype)
        if dtype.itemsize == 1:
            codes_PSKH, scales_PSK = map(np.asarray, jax.jit(quantize_entries, static_argnums=1)(x_PSKH, dtype))
            scales_PKS = np.where(is_written_PS[:, None], scales_PSK.transpose(0, 2, 1), np.float32(np.nan))
            return jnp.asarray(codes_PSKH.transpose(0, 2, 1, 3)), jnp.asarray(scales_PKS)
        return jnp.asarray(np.where(is_written_PS[:, None, :, None], x_PSKH.transpose(0, 2, 1, 3), np.nan).astype(dtype)), None


DECODE = (
    Case((100, 1, 0, 64)),
    Case((100, 65), window=20, softcap=5.0, has_sinks=True),
    Case((100, 40), cache_dtype="int8"),
    Case((70, 64), cache_dtype="float8_e4m3fn", page_size=64, num_parts=3, has_sinks=True),
    Case((1300, 130), heads=3, kv_heads=1, num_parts=45),
)
CHUNKS = (
    Case((100, 1, 0), num_tokens=20, heads=8),
    Case((300, 64), num_tokens=9, page_size=64, cache_dtype="int8", softcap=5.0, window=40, has_sinks=True),
    Case((70, 200, 2), num_tokens=(10, 1, 2), page_size=16, num_parts=14),
)
RARER = (
    Case((90, 33), page_size=16, head_dim=256),
    Case((200,), page_size=256, num_parts=1, heads=1, kv_heads=1),
    Case((150,), page_size=128, num_parts=2, cache_dtype="int8", window=30),
    Case((1500,), num_tokens=20, num_parts=50, head_dim=256),
    Case((500, 60), num_tokens=(33, 1), cache_dtype="float8_e4m3fn", num_parts=16, window=100),
)

SHAPES = (  # of llama-3.1-8b, decode at 64 rows of 4096 tokens and the like
    Case((4096,) * 64, heads=32, kv_heads=8, page_size=64, num_parts=64),
    Case((4096,) * 64, heads=32, kv_heads=8, page_size=64, num_parts=64, cache_dtype="int8"),
    Case((4096,) * 64, heads=32, kv_heads=8, page_size=64, num_parts=64, cache_dtype="float8_e4m3fn"),
    Case((32768,) * 4, heads=32, kv_heads=8, page_size=64, num_parts=512),
    Case((4096,), num_tokens=512, heads=32, kv_heads=8, page_size=64, num_parts=64),
    Case((2048,) * 33, num_tokens=(*(1,) * 32, 480), heads=32, kv_heads=8, page_size=64, num_parts=64),
)
