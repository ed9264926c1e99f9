"""Root mean square layer normalization (Zhang & Sennrich 2019, arXiv:1910.07467).

    s = x + residual,   y = s / sqrt(mean(s^2) + eps) * (weight + offset)

The mean is taken over the last dim in float32, whatever the input's dtype; ``s`` is rounded to the input's dtype before. A quantized y has one scale
a row, the largest magnitude over the largest code:

    y ~ scale * codes,   scale = max_d abs(y[d]) / largest
"""
import jax
import jax.numpy as jnp

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""Dtypes of a quantized output, and the largest code of each."""


def rms_norm_reference(x_D: jax.Array, weight_D: jax.Array, *, eps: float, residual_D: jax.Array | None = None, offset: float = 0.0,
                       quantized: str | None = None):
    """RMSNorm over the last dim.

    Args:
        x_D: [..., D], any float dtype.
        weight_D: [D] scale.
        eps: added to the mean square before the root.
        residual_D: [..., D], added to ``x_D`` before; None for nothing.
        offset: added to the weight, in float32.
        quantized: a key of :data:`LARGEST`; None for floats.

    Returns:
        y: [..., D] in ``x_D``'s dtype; (codes [..., D], scales [...] float32) where it is quantized. With a residual: (y, s).
    """
    s_D = x_D if residual_D is None else x_D + residual_D
    s32_D = s_D.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(s32_D), axis=-1, keepdims=True) + eps)
    y_D = s32_D * scale * (weight_D.astype(jnp.float32) + offset)
    y = y_D.astype(x_D.dtype) if quantized is None else quantize_rows(y_D, quantized)
    return y if residual_D is None else (y, s_D)


def quantize_rows(y_D: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """(codes [..., D], scales [...]) of float32 rows; see the formula above."""
    scaled_D, scale = scale_rows(y_D, dtype)
    return round_codes(scaled_D, dtype), scale[..., 0]


def scale_rows(y_D: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """(codes in float32, not rounded yet [..., D], scales [..., 1]) of float32 rows, for kernels too."""
    largest = LARGEST[dtype]
    most = jnp.max(jnp.abs(y_D), axis=-1, keepdims=True)
    inverse = jnp.where(most > 0, largest / jnp.where(most > 0, most, 1.0), 0.0)
    return jnp.clip(y_D * inverse, -largest, largest), most * (1 / largest)


def results(x_MD: jax.Array, residual_MD: jax.Array | None, quantized: str | None, scales_shape: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    """What a kernel gives for rows [M, D]: y or its codes, the scales of codes, and the sum where there is a residual."""
    outs = [jax.ShapeDtypeStruct(x_MD.shape, quantized or x_MD.dtype)]
    outs += [jax.ShapeDtypeStruct(scales_shape, jnp.float32)] if quantized is not None else []
    return outs + ([jax.ShapeDtypeStruct(x_MD.shape, x_MD.dtype)] if residual_MD is not None else [])


def round_codes(scaled_D: jax.Array, dtype: str) -> jax.Array:
    """Codes of :func:`scale_rows`, in their dtype."""
    return (jnp.round(scaled_D) if dtype == "int8" else scaled_D).astype(dtype)
