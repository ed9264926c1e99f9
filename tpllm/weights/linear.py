"""The one product of activations and a weight matrix, the lookup in one, and the gated MLP of three, whatever multiplies them."""
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gated_mlp import Activation, gated
from sharding_rules import ONE_DEVICE, Partition
from tpllm.weights.weight import Biases, Weight
from tpllm.weights.xla import XlaLayout

Matrix = jax.Array | Weight
"""What a model's parameters hold."""


def weight_of(matrix: Matrix, axes: tuple[str | None, str | None] = (None, None), partition: Partition = ONE_DEVICE) -> Weight:
    """A matrix as a weight; plain arrays, which have these logical axes, are XLA's."""
    return matrix if isinstance(matrix, Weight) else XlaLayout(None, matrix.shape, axes, partition).build({"codes": matrix})


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


def linears(x_D: jax.Array, matrices: Sequence[Matrix], biases: Biases, *, dtype: Any = None) -> tuple[jax.Array, ...]:
    """:func:`linear` for several weights of one input that lie alike on the mesh; kernels read them in one go."""
    weights = tuple(map(weight_of, matrices))
    first = weights[0]
    if len(weights) > 1 and not _are_alike(weights):
        return tuple(linear(x_D, weight, bias, dtype=dtype) for weight, bias in zip(weights, biases, strict=True))
    if first.order is not None:
        return (linear(jnp.take(x_D, first.order, axis=-1), first.replace(order=None), biases[0], dtype=dtype),)
    if first.num_outliers:
        return _with_outliers(x_D, weights, biases, dtype or x_D.dtype)
    return first.matmul(x_D, weights, biases, dtype or x_D.dtype)


def _are_alike(weights: Sequence[Weight]) -> bool:
    """Whether they are multiplied in one way, with columns in order."""
    return len({(type(weight), weight.num_outliers) for weight in weights}) == 1 and all(weight.order is None for weight in weights)


def _with_outliers(x_D: jax.Array, weights: Sequence[Weight], biases: Biases, dtype: Any) -> tuple[jax.Array, ...]:
    """LLM.int8's product (Dettmers et al. 2022, arXiv:2208.07339): outliers apart from the rest, each row with its own, so that it does not depend on
    its batch. The paper's are the columns with a value above 6 in any row."""
    size_D = jnp.abs(x_D.astype(jnp.float32))
    is_outlier_D = size_D >= jax.lax.top_k(size_D, min(weights[0].num_outliers, x_D.shape[-1]))[0][..., -1:]

    def products(part_D: jax.Array, *, quantizes_input: bool) -> tuple[jax.Array, ...]:
        parts = [weight.without_outliers(quantizes_input=quantizes_input) for weight in weights]
        return linears(part_D, parts, (None,) * len(weights), dtype=jnp.float32)
    low = products(jnp.where(is_outlier_D, 0, x_D), quantizes_input=True)
    high = products(jnp.where(is_outlier_D, x_D, 0), quantizes_input=False)
    sums = [low_F + high_F for low_F, high_F in zip(low, high, strict=True)]
    return tuple((y_F if bias_F is None else y_F + bias_F.astype(jnp.float32)).astype(dtype) for y_F, bias_F in zip(sums, biases, strict=True))


def gated_mlp(x_BTD: jax.Array, matrices: tuple[Matrix, Matrix, Matrix], biases: Biases, *, activation: Activation) -> jax.Array:
    """``down(act(gate(x)) * up(x))``, in one call where a kernel does it.

    Args:
        x_BTD: activations.
        matrices: gate and up [F, D], down [D, F].
        biases: of the three, or None.
        activation: see :func:`pallas_kernels.gated_mlp.gated`.
    """
    gate, up, down = weights = tuple(map(weight_of, matrices))
    if _are_alike(weights) and not gate.num_outliers and gate.fuses_with(up):
        return gate.gated_mlp(x_BTD, weights, biases, activation=activation)
    gate_BTF, up_BTF = (linear(x_BTD, weight, bias) for weight, bias in zip((gate, up), biases[:2], strict=True))
    return linear(gated(gate_BTF, up_BTF, activation), down, biases[2])


def lookup(tokens_BT: jax.Array, table_VD: Matrix, dtype: Any) -> jax.Array:
    """[..., D]: the rows of an embedding table that belong to int32 token ids; ids beyond it take its last row."""
    table = weight_of(table_VD)
    if table.order is not None:
        return lookup(tokens_BT, table.replace(order=None), dtype)[..., jnp.argsort(table.order)]
    return table.lookup(tokens_BT, dtype)
