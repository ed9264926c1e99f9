"""Weights that kernels multiply, in one call a shard: for the native kernels of CPUs, and for those of accelerators."""
import abc
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp

from pallas_kernels.gated_mlp import Activation
from sharding_rules.axes import BATCH
from tpllm.ops import HIDDEN_AXES, POSITION_AXES
from tpllm.weights.weight import Biases, Weight


class ShardedWeight(Weight):
    """What the weights of kernels have in common: left to automatic partitioning, XLA would gather what kernels read."""

    @classmethod
    @abc.abstractmethod
    def shard_matmul(cls, x_D: jax.Array, weights: Sequence[Self], biases: Biases, dtype: Any) -> tuple[jax.Array, ...]:
        """The products of a shard."""

    @classmethod
    @abc.abstractmethod
    def shard_gated_mlp(cls, x_BTD: jax.Array, weights: tuple[Self, Self, Self], biases: Biases, activation: Activation) -> jax.Array:
        """The MLP of a shard."""

    @abc.abstractmethod
    def shard_lookup(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """[..., K]: rows of a shard; a token outside of it gives zeros."""

    @classmethod
    def matmul(cls, x_D: jax.Array, weights: Sequence[Self], biases: Biases, dtype: Any) -> tuple[jax.Array, ...]:
        """See :meth:`.Weight.matmul`."""
        layout, lead = weights[0].layout, (BATCH, *(None,) * (x_D.ndim - 2))
        n_axes, k_axis = [weight.layout.axes[0] for weight in weights], layout.axes[1]
        is_summed = layout.num_shards[1] > 1
        inner_biases = [None] * len(weights) if is_summed else biases

        def multiply(x: jax.Array, weights: Sequence[Self], biases: Biases) -> tuple[jax.Array, ...]:
            return tuple(layout.partition.sum_shards(out, k_axis) for out in cls.shard_matmul(x, weights, biases, dtype))
        outs = _on_shards(multiply, x_D, weights, inner_biases, x_axes=(*lead, k_axis), bias_axes=n_axes, out_axes=[(*lead, axis) for axis in n_axes])
        return tuple(out if bias is None or not is_summed else out + bias.astype(out.dtype) for out, bias in zip(outs, biases, strict=True))

    @classmethod
    def gated_mlp(cls, x_BTD: jax.Array, weights: tuple[Self, Self, Self], biases: Biases, *, activation: Activation) -> jax.Array:
        """See :meth:`.Weight.gated_mlp`."""
        layout = weights[2].layout
        mlp_axis, is_summed = layout.axes[1], layout.num_shards[1] > 1
        inner_biases = (*biases[:2], None if is_summed else biases[2])

        def multiply(x: jax.Array, weights: tuple[Self, Self, Self], biases: Biases) -> tuple[jax.Array]:
            return (layout.partition.sum_shards(cls.shard_gated_mlp(x, weights, biases, activation), mlp_axis),)
        out, = _on_shards(multiply, x_BTD, weights, inner_biases, x_axes=HIDDEN_AXES, bias_axes=(mlp_axis, mlp_axis, None), out_axes=[HIDDEN_AXES])
        return out if biases[2] is None or not is_summed else out + biases[2].astype(out.dtype)

    def lookup(self, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
        """See :meth:`.Weight.lookup`."""
        layout, axis = self.layout, self.layout.axes[0]

        def read(tokens: jax.Array, weights: tuple[Self], _: Biases) -> tuple[jax.Array]:
            own = tokens if layout.num_shards[0] == 1 else tokens - layout.partition.shard_index(axis) * layout.shard_shape[0]
            return (layout.partition.sum_shards(weights[0].shard_lookup(own, dtype), axis),)
        tokens_BT = jnp.clip(tokens_BT, 0, layout.shape[0] - 1)
        return _on_shards(read, tokens_BT, (self,), (None,), x_axes=POSITION_AXES, bias_axes=(None,), out_axes=[HIDDEN_AXES])[0]


def _on_shards(function, x: jax.Array, weights: Sequence[ShardedWeight], biases: Biases, *, x_axes, bias_axes, out_axes) -> tuple[jax.Array, ...]:
    """``function(x, weights, biases)`` run by each device on its shards."""
    partition, weights, biases = weights[0].layout.partition, tuple(weights), tuple(biases)
    bias_specs = tuple(None if bias is None else partition.spec((axis,)) for bias, axis in zip(biases, bias_axes, strict=True))
    in_specs = (partition.spec(x_axes), tuple(weight.specs() for weight in weights), bias_specs)
    return partition.shard_map(function, in_specs, tuple(map(partition.spec, out_axes)))(x, weights, biases)
