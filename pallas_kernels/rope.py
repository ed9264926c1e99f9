"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), the halves of a head's rotated dims paired.

    y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin,   where x = [x1, x2, the dims that are not rotated]
"""
import jax
import jax.numpy as jnp


def rope_reference(x_BTNH: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Rotate the first R dims of every head; computed in float32.

    Args:
        x_BTNH: queries or keys.
        cos_BTR, sin_BTR: float32, of each position's angles, which stand twice.

    Returns:
        [B, T, N, H] in ``x_BTNH``'s dtype.
    """
    num_rotated = cos_BTR.shape[-1]
    x32 = x_BTNH[..., :num_rotated].astype(jnp.float32)
    first, second = jnp.split(x32, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    rotated = (x32 * cos_BTR[:, :, None] + turned * sin_BTR[:, :, None]).astype(x_BTNH.dtype)
    return jnp.concatenate([rotated, x_BTNH[..., num_rotated:]], axis=-1) if num_rotated < x_BTNH.shape[-1] else rotated
