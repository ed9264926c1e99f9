"""Root mean square layer normalization (Zhang & Sennrich 2019, arXiv:1910.07467).

    y = x / sqrt(mean(x^2) + eps) * weight

The mean is taken over the last dim in float32, whatever the input's dtype.
"""
import jax
import jax.numpy as jnp


def rms_norm_reference(x_D: jax.Array, weight_D: jax.Array, *, eps: float) -> jax.Array:
    """RMSNorm over the last dim.

    Args:
        x_D: [..., D], any float dtype.
        weight_D: [D] scale.
        eps: added to the mean square before the root.

    Returns:
        [..., D] in ``x_D``'s dtype.
    """
    x32_D = x_D.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32_D), axis=-1, keepdims=True) + eps)
    return (x32_D * scale * weight_D.astype(jnp.float32)).astype(x_D.dtype)
