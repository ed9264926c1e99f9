"""The gated feed-forward layer (GLU variants: Shazeer 2020, arXiv:2002.05202).

    y = (act(x gate.T) * (x up.T)) down.T
"""
import dataclasses
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


@dataclasses.dataclass(frozen=True)
class ClampedGlu:
    """Replaces the activation: ``gate sigmoid(alpha gate) (up + 1)`` of a gate and an up that are cut off (gpt-oss: OpenAI 2025, arXiv:2508.10925).

    Attributes:
        limit: the most that gate is, and up in size.
        alpha: 1.702 makes of ``gate sigmoid(alpha gate)`` an approximate GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415).
    """

    limit: float
    alpha: float = 1.702


Activation = str | ClampedGlu
"""A key of ``ACTIVATIONS``, or a rule for gate and up together."""


def gated(gate_F: jax.Array, up_F: jax.Array, activation: Activation) -> jax.Array:
    """What the down projection multiplies; ``act(gate) * up`` of plain activations."""
    if not isinstance(activation, ClampedGlu):
        return ACTIVATIONS[activation](gate_F) * up_F
    gate_F = jnp.minimum(gate_F, activation.limit)
    return gate_F * jax.nn.sigmoid(activation.alpha * gate_F) * (jnp.clip(up_F, -activation.limit, activation.limit) + 1)


def gated_product_reference(x_MD: jax.Array, gate_FD: jax.Array, up_FD: jax.Array, *, activation: Activation,
                            biases: tuple[jax.Array | None, jax.Array | None] = (None, None)) -> jax.Array:
    """What the down projection of dense weights multiplies, computed in float32; [M, F] in ``x_MD``'s dtype.

    Args:
        x_MD: activations.
        gate_FD, up_FD: weights.
        activation: see :func:`gated`.
        biases: of gate and up, [F] or None.
    """
    gate_MF, up_MF = (quant_matmul_reference(x_MD, weight, bias=bias, dtype=jnp.float32)
                      for weight, bias in zip((gate_FD, up_FD), biases, strict=True))
    return gated(gate_MF, up_MF, activation).astype(x_MD.dtype)


def gated_mlp_reference(x_MD: jax.Array, gate_FD: jax.Array, up_FD: jax.Array, down_DF: jax.Array, *,
                        activation: Activation) -> jax.Array:
    """The layer on dense weights, in float32 but for the inner activations, which have ``x_MD``'s dtype; [M, D] in it.

    Args:
        x_MD: activations.
        gate_FD, up_FD, down_DF: weights.
        activation: see :func:`gated`.
    """
    return quant_matmul_reference(gated_product_reference(x_MD, gate_FD, up_FD, activation=activation), down_DF)
