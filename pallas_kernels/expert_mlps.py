"""Gated MLPs of many experts, each over the rows that were sent to it.

    y[s] = (act(x[s] gate[e].T) * (x[s] up[e].T)) down[e].T        for the rows s of expert e

Each of the three products may add a bias of the expert.
"""
import jax
import jax.numpy as jnp

from pallas_kernels.gated_mlp import Activation, gated
from pallas_kernels.precision import matmul_precision
from pallas_kernels.quant_matmul import int8_rows

DIMENSIONS = jax.lax.RaggedDotDimensionNumbers(dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=(0,))


def expert_mlps_reference(x_SD: jax.Array, counts_E: jax.Array, gate_EFD: jax.Array, up_EFD: jax.Array, down_EDF: jax.Array, *,
                          activation: Activation, biases: tuple[jax.Array | None, jax.Array | None, jax.Array | None] = (None, None, None),
                          rounds_input: tuple[bool, bool, bool] = (False, False, False)) -> jax.Array:
    """The layer on dense weights, sums in float32; [S, D] in ``x_SD``'s dtype.

    Args:
        x_SD: the rows of one expert after those of the other.
        counts_E: int32, how many each has; together S at most. What rows beyond them give is not said.
        gate_EFD, up_EFD, down_EDF: weights.
        activation: see :func:`pallas_kernels.gated_mlp.gated`.
        biases: [E, F], [E, F] and [E, D], or None.
        rounds_input: whether what gate, up and down multiply is rounded to int8 before, one scale a row.
    """
    expert_S = jnp.repeat(jnp.arange(counts_E.shape[0]), counts_E, total_repeat_length=x_SD.shape[0])

    def product(rows_SK: jax.Array, weight_ENK: jax.Array, is_rounded: bool) -> jax.Array:
        if is_rounded:
            codes_SK, scales_S = int8_rows(rows_SK)
            return product(codes_SK, weight_ENK, False) * scales_S[:, None]
        return jax.lax.ragged_dot_general(rows_SK, weight_ENK.astype(rows_SK.dtype), counts_E, DIMENSIONS, preferred_element_type=jnp.float32,
                                          precision=matmul_precision(rows_SK.dtype))

    def biased(rows_SK: jax.Array, weight_ENK: jax.Array, index: int) -> jax.Array:
        y_SN = product(rows_SK, weight_ENK, rounds_input[index])
        return y_SN if biases[index] is None else y_SN + biases[index].astype(jnp.float32)[expert_S]
    inner_SF = gated(biased(x_SD, gate_EFD, 0), biased(x_SD, up_EFD, 1), activation)
    return biased(inner_SF.astype(x_SD.dtype), down_EDF, 2).astype(x_SD.dtype)
