"""What RMSNorm is tested and measured on."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; D is the row's length."""

    rows: tuple[int, ...]
    D: int
    dtype: str = "bfloat16"
    has_residual: bool = False
    quantized: str | None = None
    offset: float = 0.0

    def arrays(self, seed: int) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """(x, weight, residual or None) of this seed; some rows are large, one is zero."""
        rng = np.random.default_rng(seed)
        x, residual = (rng.normal(size=(*self.rows, self.D)) * rng.choice([0.01, 1, 30], size=(*self.rows, 1)) for _ in range(2))
        x[(-1,) * len(self.rows)] = 0
        weight = rng.normal(size=self.D) * 0.2 + 1 - self.offset
        return jnp.asarray(x, self.dtype), jnp.asarray(weight, self.dtype), jnp.asarray(residual, self.dtype) if self.has_residual else None


CASES = (
    Case((1,), 128),
    Case((3, 7), 256, has_residual=True),
    Case((9,), 640, "float32", has_residual=True, offset=1.0),
    Case((5,), 384, "float16", offset=1.0),
    Case((2, 3), 256, quantized="int8"),
    Case((4,), 256, quantized="float8_e4m3fn", has_residual=True),
    Case((33,), 128, "float32", quantized="int8", has_residual=True, offset=1.0),
    Case((3,), 128, "float32", quantized="float8_e4m3fn"),
)

SHAPES = (Case((1,), 4096, has_residual=True), Case((64,), 4096, has_residual=True, quantized="int8"),
          Case((8192,), 4096, has_residual=True), Case((2048,), 8192, quantized="float8_e4m3fn"))
"""Shapes of models in use."""
