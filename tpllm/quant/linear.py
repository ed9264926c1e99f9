"""The one product of activations and a weight matrix."""
import jax

from pallas_kernels.precision import matmul_precision


def linear(x_D: jax.Array, weight_FD: jax.Array, bias_F: jax.Array | None = None) -> jax.Array:
    """``x @ weight.T + bias``.

    Args:
        x_D: [..., D] activations.
        weight_FD: [F, D], the layout checkpoints hold; no transpose is made.
        bias_F: [F] or None.

    Returns:
        [..., F] in ``x_D``'s dtype, so that the all-reduce of a row-parallel product runs in the activations' dtype.
    """
    y_F = jax.lax.dot_general(x_D, weight_FD.astype(x_D.dtype), (((x_D.ndim - 1,), (1,)), ((), ())), precision=matmul_precision(x_D.dtype))
    return y_F if bias_F is None else y_F + bias_F.astype(y_F.dtype)
