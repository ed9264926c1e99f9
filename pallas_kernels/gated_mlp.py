"""The gated feed-forward layer (GLU variants: Shazeer 2020, arXiv:2002.05202).

    y = (act(x gate.T) * (x up.T)) down.T
"""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.quant_matmul import quant_matmul_reference

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def gated_mlp_reference(x_MD: jax.Array, gate_FD: jax.Array, up_FD: jax.Array, down_DF: jax.Array, *, activation: str) -> jax.Array:
    """The layer on dense weights, in float32 but for the inner activations, which have ``x_MD``'s dtype; [M, D] in it.

    Args:
        x_MD: activations.
        gate_FD, up_FD, down_DF: weights.
        activation: a key of ``ACTIVATIONS``.
    """
    gate_MF, up_MF = (quant_matmul_reference(x_MD, weight, dtype=jnp.float32) for weight in (gate_FD, up_FD))
    inner_MF = (ACTIVATIONS[activation](gate_MF) * up_MF).astype(x_MD.dtype)
    return quant_matmul_reference(inner_MF, down_DF)
