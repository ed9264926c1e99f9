"""What the kernels are tested and measured on."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        num_queries, num_keys: of each row.
        heads, kv_heads, head_dim: of the arrays.
        lengths: real tokens of each row; padding stands behind.
        dtype: of queries, keys and values.
        window, softcap: see ``flash_attention_reference``.
        has_sinks: whether heads have sinks.
        offset: position of the first query, for a later chunk of a prefill; None where keys are the queries' own.
        segment_lengths: texts packed into each row; empty where a row is one text.
    """

    num_queries: int
    num_keys: int
    heads: int
    kv_heads: int
    head_dim: int
    lengths: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    offset: int | None = None
    segment_lengths: tuple[int, ...] = ()

    def __str__(self) -> str:
        return " ".join(f"{field.name}={value}" for field in dataclasses.fields(self) if (value := getattr(self, field.name)) != field.default)

    @property
    def scale(self) -> float:
        """The usual one."""
        return self.head_dim ** -0.5

    def arrays(self, seed: int) -> tuple[tuple[jax.Array, jax.Array, jax.Array, jax.Array], dict[str, Any]]:
        """((queries, keys, values, positions), the other arguments but ``device``)."""
        rng = np.random.default_rng(seed)
        B = max(1, len(self.lengths))
        shapes = ((B, self.num_queries, self.heads, self.head_dim), *((B, self.num_keys, self.kv_heads, self.head_dim),) * 2)
        q, k, v = (jnp.asarray(rng.normal(size=shape), self.dtype) for shape in shapes)
        lengths = np.array(self.lengths or (self.num_queries,))[:, None]
        index = np.arange(self.num_queries)[None]
        how: dict[str, Any] = {"scale": self.scale, "window": self.window, "softcap": self.softcap}
        positions = np.where(index < lengths, index + (self.offset or 0), -1)
        if self.offset is not None:
            keys = np.arange(self.num_keys)[None]
            how["key_positions_BS"] = jnp.asarray(np.where(keys < self.offset + lengths, keys, -1), jnp.int32)
        if self.segment_lengths:
            segments = np.repeat(np.arange(len(self.segment_lengths)), self.segment_lengths)[None]
            starts = np.repeat(np.cumsum((0, *self.segment_lengths[:-1])), self.segment_lengths)[None]
            how["segments_BT"] = jnp.asarray(np.broadcast_to(segments, positions.shape), jnp.int32)
            positions = np.where(positions < 0, -1, positions - starts)
        if self.has_sinks:
            how["sinks_N"] = jnp.asarray(rng.normal(size=self.heads) * 2, jnp.float32)
        return (q, k, v, jnp.asarray(positions, jnp.int32)), how


CASES = (
    Case(256, 256, 2, 1, 64),
    Case(200, 200, 1, 1, 128, lengths=(200,)),
    Case(300, 300, 1, 1, 64, window=70),
    Case(130, 130, 2, 2, 64, softcap=3.0, has_sinks=True, dtype="float16"),
    Case(96, 480, 2, 1, 80, lengths=(96, 40), offset=384),
    Case(64, 640, 1, 1, 96, offset=500, window=200, has_sinks=True),
    Case(384, 384, 1, 1, 64, lengths=(360,), segment_lengths=(100, 150, 134)),
    Case(128, 128, 1, 1, 256, lengths=(128, 0)),
    Case(128, 192, 1, 1, 192, offset=60),
    Case(260, 260, 2, 1, 64, dtype="float32", window=100),
    Case(128, 128, 1, 1, 128, dtype="float32", softcap=5.0),
)
"""Small ones, of every kind."""
