"""The one product of activations and a weight matrix, dense, quantized or packed."""
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.precision import matmul_precision
from pallas_kernels.quant_matmul import int8_matmul_reference
from tpllm import weight_ops
from tpllm.kernel_weights import KernelWeight
from tpllm.native.packed import PackedWeight
from tpllm.quant.quantized_tensor import QuantizedTensor

Matrix = jax.Array | QuantizedTensor | PackedWeight | KernelWeight
QUANTIZED = QuantizedTensor | PackedWeight | KernelWeight


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
    if any(has_order(weight) for weight in weights):
        return tuple(_ordered(x_D, weight, bias, dtype) for weight, bias in zip(weights, biases, strict=True))
    counts = {num_outliers(weight) for weight in weights}
    if len(counts) > 1:
        return tuple(linear(x_D, weight, bias, dtype=dtype) for weight, bias in zip(weights, biases, strict=True))
    if counts != {0}:
        return _with_outliers(x_D, weights, biases, dtype)
    if {type(weight) for weight in weights} in ({PackedWeight}, {KernelWeight}):
        return weight_ops.packed_linears(x_D, weights, biases, dtype)
    return tuple(_alone(x_D, weight, bias, dtype or x_D.dtype) for weight, bias in zip(weights, biases, strict=True))


def has_order(weight: Matrix) -> bool:
    """Whether a weight's columns are out of order."""
    return isinstance(weight, QUANTIZED) and weight.order is not None


def num_outliers(weight: Matrix) -> int:
    """How many inputs of a row a weight multiplies as they are while the others become int8."""
    return weight.num_outliers if isinstance(weight, QUANTIZED) else 0


def _with_outliers(x_D: jax.Array, weights: Sequence[Matrix], biases: Sequence[jax.Array | None], dtype: Any) -> tuple[jax.Array, ...]:
    """LLM.int8's product (Dettmers et al. 2022, arXiv:2208.07339): outliers apart from the rest, each row with its own, so that it does not depend on
    its batch. The paper's are the columns with a value above 6 in any row."""
    size_D = jnp.abs(x_D.astype(jnp.float32))
    is_outlier_D = size_D >= jax.lax.top_k(size_D, min(num_outliers(weights[0]), x_D.shape[-1]))[0][..., -1:]

    def products(part_D: jax.Array, *, quantizes_input: bool) -> tuple[jax.Array, ...]:
        parts = [weight.without_outliers(quantizes_input=quantizes_input) for weight in weights]
        return linears(part_D, parts, (None,) * len(weights), dtype=jnp.float32)
    low = products(jnp.where(is_outlier_D, 0, x_D), quantizes_input=True)
    high = products(jnp.where(is_outlier_D, x_D, 0), quantizes_input=False)
    sums = [low_F + high_F for low_F, high_F in zip(low, high, strict=True)]
    return tuple((y_F if bias_F is None else y_F + bias_F.astype(jnp.float32)).astype(dtype or x_D.dtype)
                 for y_F, bias_F in zip(sums, biases, strict=True))


def _ordered(x_D: jax.Array, weight_FD: Matrix, bias_F: jax.Array | None, dtype: Any) -> jax.Array:
    if not has_order(weight_FD):
        return linear(x_D, weight_FD, bias_F, dtype=dtype)
    return linear(jnp.take(x_D, weight_FD.order, axis=-1), weight_FD.replace(order=None), bias_F, dtype=dtype)


def lookup(tokens: jax.Array, table_VD: Matrix, dtype: Any) -> jax.Array:
    """[..., D]: the rows of an embedding table that belong to int32 token ids; ids beyond it take its last row."""
    if has_order(table_VD):
        return lookup(tokens, table_VD.replace(order=None), dtype)[..., jnp.argsort(table_VD.order)]
    if isinstance(table_VD, PackedWeight | KernelWeight):
        return weight_ops.packed_lookup(tokens, table_VD, dtype)
    if isinstance(table_VD, QuantizedTensor):
        return table_VD.rows(tokens, dtype)
    return table_VD.at[tokens].get(mode="clip").astype(dtype)


def _alone(x_D: jax.Array, weight_FD: jax.Array | QuantizedTensor | KernelWeight, bias_F: jax.Array | None, dtype: Any) -> jax.Array:
    if isinstance(weight_FD, KernelWeight):
        return weight_ops.packed_linears(x_D, (weight_FD,), (bias_F,), dtype)[0]
    if isinstance(weight_FD, QuantizedTensor) and weight_FD.layout.kept.quantizes_input:
        rows = x_D.reshape(-1, x_D.shape[-1])
        y_F = int8_matmul_reference(rows, weight_FD.codes, weight_FD.scales[:, 0].astype(jnp.float32), dtype=dtype).reshape(*x_D.shape[:-1], -1)
        return y_F if bias_F is None else y_F + bias_F.astype(y_F.dtype)
    weight_FD = weight_FD.dequantize(x_D.dtype) if isinstance(weight_FD, QuantizedTensor) else weight_FD.astype(x_D.dtype)
    y_F = jax.lax.dot_general(x_D, weight_FD, (((x_D.ndim - 1,), (1,)), ((), ())), precision=matmul_precision(x_D.dtype),
                              preferred_element_type=jnp.dtype(dtype))
    return y_F if bias_F is None else y_F + bias_F.astype(y_F.dtype)
