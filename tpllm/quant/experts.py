"""The gated MLPs of routed experts on matrices that are dense, quantized or packed, and how they lie on a mesh."""
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.expert_mlps import expert_mlps_reference
from pallas_kernels.gated_mlp import Activation
from sharding_rules import Partition
from sharding_rules.axes import BATCH, EMBED, EXPERT_MLP, EXPERTS, MLP
from tpllm.native import products
from tpllm.native.packed import PackedWeight
from tpllm.quant.linear import Matrix
from tpllm.quant.quantized_tensor import QuantizedTensor

INNER_AXES, OUTER_AXES, TOKEN_AXES = (EXPERT_MLP, EMBED), (EXPERTS, MLP), (BATCH, None, None)


class Experts(NamedTuple):
    """The parameters of all experts, each expert's rows from a multiple of 32 on.

    Attributes:
        matrices: gate and up [E*F, D] and down [E*D, F].
        biases: of each [E*F], [E*F] and [E*D], or None.
    """

    matrices: tuple[Matrix, Matrix, Matrix]
    biases: tuple[jax.Array | None, jax.Array | None, jax.Array | None] = (None, None, None)


def on_experts(function: Callable[..., jax.Array], x_BTD: jax.Array, routing: tuple[jax.Array, jax.Array], experts: Experts,
               partition: Partition) -> jax.Array:
    """``function(x, routing, experts, group)`` run by each device for its group of experts, results added up; [B, T, D].

    Tokens are on every device of a data group. Each takes those that go to its own experts, so nothing but the sum is sent.

    Args:
        function: of a shard's arrays and its index among the groups of experts.
        x_BTD: activations.
        routing: (weights, experts), both [B, T, k].
        experts: the parameters.
        partition: the model's mesh and rules.
    """
    def on_shard(x: jax.Array, routing: tuple[jax.Array, jax.Array], experts: Experts) -> jax.Array:
        gate_bias, up_bias, down_bias = experts.biases
        if down_bias is not None and partition.size(MLP) > 1:  # shards of F are added up, and one of them adds the bias
            down_bias = jnp.where(partition.shard_index(MLP) == 0, down_bias, 0)
        experts = experts._replace(biases=(gate_bias, up_bias, down_bias))
        return partition.sum_shards(function(x, routing, experts, partition.shard_index(EXPERTS)), EXPERT_MLP)
    tokens = partition.spec(TOKEN_AXES)
    axes = (INNER_AXES, INNER_AXES, OUTER_AXES)
    specs = Experts(tuple(map(functools.partial(_spec, partition), experts.matrices, axes)), tuple(
        None if bias is None else partition.spec(own[:1]) for bias, own in zip(experts.biases, axes, strict=True)))
    return partition.shard_map(on_shard, (tokens, (tokens, tokens), specs), tokens)(x_BTD, routing, experts)


def expert_mlps(x_SD: jax.Array, counts_E: jax.Array, experts: Experts, *, activation: Activation, inner_size: int) -> jax.Array:
    """``down(act(gate(x)) * up(x))`` with the matrices of the expert that each row belongs to; see ``expert_mlps_reference``.

    Args:
        x_SD: the rows of one expert after those of the other.
        counts_E: int32 [E] of this shard: how many each has.
        experts: this shard's.
        activation: see :func:`pallas_kernels.gated_mlp.gated`.
        inner_size: F of this shard.
    """
    matrices, biases = experts
    if all(isinstance(matrix, PackedWeight) for matrix in matrices):
        return products.expert_mlps(x_SD, counts_E, *matrices, biases, activation=activation, inner_size=inner_size)
    rounds_input = tuple(isinstance(matrix, QuantizedTensor) and matrix.layout.kept.quantizes_input for matrix in matrices)
    num_experts, sizes = counts_E.shape[0], (inner_size, inner_size, x_SD.shape[1])
    dense = [_dense(matrix, num_experts, size, x_SD.dtype) for matrix, size in zip(matrices, sizes, strict=True)]
    biases = tuple(None if bias is None else bias.reshape(num_experts, -1)[:, :size] for bias, size in zip(biases, sizes, strict=True))
    return expert_mlps_reference(x_SD, counts_E, *dense, activation=activation, biases=biases, rounds_input=rounds_input)


def _dense(matrix: Matrix, num_experts: int, num_rows: int, dtype: Any) -> jax.Array:
    """[E, N, K]."""
    rows = matrix.dequantize(dtype) if isinstance(matrix, QuantizedTensor) else matrix
    return rows.reshape(num_experts, -1, rows.shape[1])[:, :num_rows]


def _spec(partition: Partition, matrix: Matrix, axes: tuple[str, str]) -> Any:
    if isinstance(matrix, PackedWeight):
        return matrix.specs(partition)
    if isinstance(matrix, QuantizedTensor):
        return matrix.replace(**{name: partition.spec(array_axes) for name, (_, _, array_axes) in matrix.layout.arrays().items()})
    return partition.spec(axes)
