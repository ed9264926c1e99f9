"""How products are computed."""
import jax
import jax.numpy as jnp


def matmul_precision(dtype) -> jax.lax.Precision:
    """float32 means float32: no TF32 and no bfloat16 passes."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
