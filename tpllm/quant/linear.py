"""The one product of activations and a weight matrix, dense, quantized or packed."""
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.precision import matmul_precision
from tpllm import ops
from tpllm.native.packed import PackedWeight
from tpllm.quant.quantized_tensor import QuantizedTensor

Matrix = jax.Array | QuantizedTensor | PackedWeight


def linear(x_D: jax.Array, weight_FD: Matrix, bias_F: jax.Array | None = None, *, dtype: Any = None) -> jax.Array:
    """``x @ weight.T + bias``.

    Args:
        x_D: [..., D] activations.
        weight_FD: [F, D], the layout checkpoints hold; no transpose is made.
        bias_F: [F] or None.
        dtype: of the result; None for ``x_D``'s, so that the all-reduce of a row-parallel product runs in the activations' dtype.

    Returns:
        [..., F].
    """
    return linears(x_D, (weight_FD,), (bias_F,), dtype=dtype)[0]


def linears(x_D: jax.Array, weights: Sequence[Matrix], biases: Sequence[jax.Array | None], *, dtype: Any = None) -> tuple[jax.Array, ...]:
    """:func:`linear` for several weights of one input that lie alike on the mesh; packed ones are read in one go."""
    if all(isinstance(weight, PackedWeight) for weight in weights):
        return ops.packed_linears(x_D, weights, biases, dtype)
    return tuple(_dense(x_D, weight, bias, dtype or x_D.dtype) for weight, bias in zip(weights, biases, strict=True))


def lookup(tokens: jax.Array, table_VD: Matrix, dtype: Any) -> jax.Array:
    """[..., D]: the rows of an embedding table that belong to int32 token ids; ids beyond it take its last row."""
    if isinstance(table_VD, PackedWeight):
        return ops.packed_lookup(tokens, table_VD, dtype)
    if isinstance(table_VD, QuantizedTensor):
        return table_VD.rows(tokens, dtype)
    return table_VD.at[tokens].get(mode="clip").astype(dtype)


def _dense(x_D: jax.Array, weight_FD: jax.Array | QuantizedTensor, bias_F: jax.Array | None, dtype: Any) -> jax.Array:
    weight_FD = weight_FD.dequantize(x_D.dtype) if isinstance(weight_FD, QuantizedTensor) else weight_FD.astype(x_D.dtype)
    y_F = jax.lax.dot_general(x_D, weight_FD, (((x_D.ndim - 1,), (1,)), ((), ())), precision=matmul_precision(x_D.dtype),
                              preferred_element_type=jnp.dtype(dtype))
    return y_F if bias_F is None else y_F + bias_F.astype(y_F.dtype)
