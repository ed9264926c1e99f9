"""The gated MLPs of routed experts, whatever multiplies their matrices, and how they lie on a mesh."""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_mlp import Activation
from sharding_rules import Partition
from sharding_rules.axes import BATCH, EMBED, EXPERT_MLP, EXPERTS, MLP
from tpllm.weights.linear import Matrix, weight_of

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
        group, (gate_bias, up_bias, down_bias) = partition.shard_index(EXPERTS), experts.biases
        if down_bias is not None and partition.size(MLP) > 1:  # shards of F are added up, and one of them adds the bias
            down_bias = jnp.where(partition.shard_index(MLP) == 0, down_bias, 0)
        experts = experts._replace(biases=(gate_bias, up_bias, down_bias))
        return partition.sum_shards(function(x, routing, experts, group), EXPERT_MLP)
    tokens, axes = partition.spec(TOKEN_AXES), (INNER_AXES, INNER_AXES, OUTER_AXES)
    weights = tuple(weight_of(matrix, own, partition) for matrix, own in zip(experts.matrices, axes, strict=True))
    experts = experts._replace(matrices=weights)
    specs = Experts(tuple(weight.specs() for weight in weights), tuple(
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
    return experts.matrices[0].expert_mlps(x_SD, counts_E, experts.matrices, experts.biases, activation=activation, inner_size=inner_size)
