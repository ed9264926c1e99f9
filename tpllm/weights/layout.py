"""How a matrix lies in memory: what every layout says of it, and does."""
import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from sharding_rules import ONE_DEVICE, Partition
from tpllm.weights.regroup import regroup, shard_of
from tpllm.weights.scheme import FLOAT32, QuantizedRows, Scheme

Arrays = dict[str, tuple[tuple[int, ...], np.dtype, tuple[str | None, ...]]]
"""(shape, dtype, logical axes) of each array, by name."""


@dataclasses.dataclass(frozen=True)
class Layout(abc.ABC):
    """What the arrays of a :class:`~tpllm.weights.weight.Weight` mean, and how rows are written into them; hashable. There is one for what XLA reads,
    one for the native kernels of CPUs, and one for the kernels of accelerators.

    Attributes:
        kept: the scheme of the arrays, whose groups no shard cuts and kernels read; None for floats.
        shape: (N, K) of the whole matrix.
        axes: the logical axes of N and K.
        partition: mesh and rules.
        source_dtype: of the floats that are written, quantized where there is a scheme.
        scheme: of the rows that are written; what the arrays mean does not depend on it. None for floats.
    """

    kept: Scheme | None
    shape: tuple[int, int]
    axes: tuple[str | None, str | None] = (None, None)
    partition: Partition = ONE_DEVICE
    source_dtype: np.dtype = FLOAT32
    scheme: Scheme | None = dataclasses.field(default=None, compare=False)

    @property
    def num_shards(self) -> tuple[int, int]:
        """Into how many parts N and K are cut."""
        return tuple(map(self.partition.size, self.axes))

    @property
    def shard_shape(self) -> tuple[int, int]:
        """(N, K) of one shard, without padding."""
        return tuple(size // parts for size, parts in zip(self.shape, self.num_shards, strict=True))

    @abc.abstractmethod
    def arrays(self) -> Arrays:
        """What the arrays are."""

    @abc.abstractmethod
    def array_axes(self, name: str) -> tuple[str | None, ...]:
        """The logical axes of an array."""

    @abc.abstractmethod
    def write(self, rows: np.ndarray | QuantizedRows, first_row: int, shard: int, out: Mapping[str, np.ndarray]) -> None:
        """Put some whole rows of one of N's shards, from a multiple of 32 on, into the arrays of K's ``shard``.

        Args:
            rows: floats in ``source_dtype`` where there is no scheme, else rows of ``scheme``.
            first_row: where they begin in the shard.
            shard: which part of K.
            out: the arrays of that shard by name.
        """

    @abc.abstractmethod
    def build(self, arrays: Mapping[str, Any]) -> Any:
        """The weight of these arrays."""

    def shard_rows(self, rows: QuantizedRows, shard: int) -> QuantizedRows:
        """The columns of K's ``shard`` of rows of ``scheme``, as ``kept`` has them."""
        return shard_of(regroup(rows, self.scheme, self.kept), self.kept, shard, self.num_shards[1])
