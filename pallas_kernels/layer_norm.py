"""Layer normalization (Ba et al. 2016, arXiv:1607.06450).

    y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias

The means are taken over the last dim in float32, whatever the input's dtype.
"""
import jax
import jax.numpy as jnp


def layer_norm_reference(x_D: jax.Array, weight_D: jax.Array, bias_D: jax.Array, *, eps: float) -> jax.Array:
    """LayerNorm over the last dim.

    Args:
        x_D: [..., D], any float dtype.
        weight_D, bias_D: [D].
        eps: added to the variance before the root.

    Returns:
        [..., D] in ``x_D``'s dtype.
    """
    x32_D = x_D.astype(jnp.float32)
    centered_D = x32_D - jnp.mean(x32_D, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(centered_D), axis=-1, keepdims=True) + eps)
    return (centered_D * scale * weight_D.astype(jnp.float32) + bias_D.astype(jnp.float32)).astype(x_D.dtype)
