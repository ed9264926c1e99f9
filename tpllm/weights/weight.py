"""What the weights that XLA, native kernels and kernels of accelerators multiply have in common: what a model asks of a matrix."""
import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax

from pallas_kernels.gated_mlp import Activation
from tpllm.weights.layout import Layout

Biases = Sequence[jax.Array | None]


class Weight(abc.ABC):
    """One matrix; its subclasses are pytrees of arrays.

    Attributes:
        layout: what the arrays mean.
        order: int32 [K], the input that each column multiplies, or None where they are in order; products take no notice of it.
    """

    ARRAYS: ClassVar[tuple[str, ...]] = ("codes", "scales", "mins", "super_scales", "super_mins")
    is_native: ClassVar[bool] = False
    """Whether the native kernels of CPUs multiply it, which give a row the same bits at any number of rows."""
    layout: Layout
    order: jax.Array | None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.layout.shape

    @property
    def num_outliers(self) -> int:
        """How many inputs of a row are to be multiplied as they are while the others become int8; products take no notice of it."""
        return 0 if self.layout.kept is None else self.layout.kept.num_outliers

    def without_outliers(self, *, quantizes_input: bool) -> Self:
        """The same weight for the inputs that are quantized, or for those that are not."""
        kept = dataclasses.replace(self.layout.kept, num_outliers=0, quantizes_input=quantizes_input)
        return self.replace(layout=dataclasses.replace(self.layout, kept=kept))

    @classmethod
    def of(cls, layout: Layout, arrays: Mapping[str, Any]) -> Self:
        """The weight of a layout's arrays by name; what is absent is None."""
        return cls(**{name: arrays.get(name) for name in cls.ARRAYS}, layout=layout)

    def arrays(self) -> dict[str, Any]:
        """The arrays that are there, by name."""
        return {name: getattr(self, name) for name in self.ARRAYS if getattr(self, name) is not None}

    def specs(self) -> Self:
        """The ``PartitionSpec`` of each array, in its place."""
        return self.replace(**{name: self.layout.partition.spec(self.layout.array_axes(name)) for name in self.arrays()})

    def fuses_with(self, up: Self) -> bool:
        """Whether one call takes this matrix as the gate and ``up`` of an MLP."""
        return True

    @classmethod
    @abc.abstractmethod
    def matmul(cls, x_D: jax.Array, weights: Sequence[Self], biases: Biases, dtype: Any) -> tuple[jax.Array, ...]:
        """``x @ w.T + bias`` for weights of one input that are cut alike, read in one go where that is faster.

        Args:
            x_D: [..., D], the first dim over the batch axis.
            weights: each [F, D]; where D is cut, so is ``x_D``, and the shards' sums are added.
            biases: each [F] or None.
            dtype: of the results.
        """

    @classmethod
    @abc.abstractmethod
    def gated_mlp(cls, x_BTD: jax.Array, weights: tuple[Self, Self, Self], biases: Biases, *, activation: Activation) -> jax.Array:
        """``down(act(gate(x)) * up(x))`` for (gate, up, down)."""

    @classmethod
    @abc.abstractmethod
    def expert_mlps(cls, x_SD: jax.Array, counts_E: jax.Array, weights: tuple[Self, Self, Self], biases: Biases, *, activation: Activation,
                    inner_size: int) -> jax.Array:
        """:meth:`gated_mlp` with another expert's matrices for each run of rows; all arrays are a shard's. See
        ``tpllm.weights.experts.expert_mlps``."""

    @abc.abstractmethod
    def lookup(self, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
        """[B, T, D]: rows of an embedding table; ids beyond it count as the nearest one that is there."""
