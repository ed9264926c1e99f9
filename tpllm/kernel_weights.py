"""Weights packed for the kernels of accelerators, as ``pallas_kernels.quant_matmul`` packs them, made once at load, shard by shard."""
import dataclasses
import functools

import jax
import numpy as np
from flax import struct

from pallas_kernels.quant_matmul import PackedArrays, WeightFormat, pack
from pallas_kernels.tiling import Device
from sharding_rules import ONE_DEVICE, Partition

ARRAYS = PackedArrays._fields


@dataclasses.dataclass(frozen=True)
class KernelLayout:
    """What the arrays of a :class:`KernelWeight` mean; hashable.

    Attributes:
        weight_format: of a shard.
        device: whose kernels read it.
        shape: (N, K) of the whole matrix.
        axes: the logical axes of N and K.
        partition: mesh and rules.
        num_outliers: how many inputs of a row are to be multiplied as they are by the caller; kernels take no notice.
    """

    weight_format: WeightFormat
    device: Device
    shape: tuple[int, int]
    axes: tuple[str | None, str | None] = (None, None)
    partition: Partition = ONE_DEVICE
    num_outliers: int = 0

    @property
    def num_shards(self) -> tuple[int, int]:
        """Into how many parts N and K are cut."""
        return tuple(map(self.partition.size, self.axes))

    @property
    def shard_shape(self) -> tuple[int, int]:
        """(N, K) of one shard, without padding."""
        return tuple(size // parts for size, parts in zip(self.shape, self.num_shards, strict=True))

    @property
    def array_axes(self) -> tuple[str | None, ...]:
        """The logical axes of every array: those of N and K cut the first two dims, and each shard has arrays of its own."""
        return (*self.axes, None, None)

    @property
    def has_outputs_first(self) -> bool:
        """Whether codes have outputs first and inputs second."""
        return self.weight_format.layout != "columns"

    def array_shapes(self, dtypes: dict[str, tuple[int, np.dtype]]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """(shape, dtype) of each array.

        Args:
            dtypes: (columns, dtype) of codes, scales and so on before packing, of K of a shard.
        """
        rows = {name: jax.ShapeDtypeStruct((self.shard_shape[0], columns), dtype) for name, (columns, dtype) in dtypes.items()}
        packed = jax.eval_shape(functools.partial(pack, self.weight_format), rows["codes"], *(rows.get(name) for name in ARRAYS[2:]))
        return {name: ((*self.num_shards, *array.shape), array.dtype) for name, array in packed._asdict().items() if array is not None}


@struct.dataclass
class KernelWeight:
    """One matrix as the kernels of an accelerator read it.

    Attributes:
        codes, high, scales, mins, super_scales, super_mins: of :class:`~pallas_kernels.quant_matmul.PackedArrays`, each behind two dims more: the
            shards of N, and those of K.
        layout: what they mean.
        order: int32 [K], the input that each column multiplies, or None where they are in order.
    """

    codes: jax.Array
    high: jax.Array | None
    scales: jax.Array
    mins: jax.Array | None
    super_scales: jax.Array | None
    super_mins: jax.Array | None
    layout: KernelLayout = struct.field(pytree_node=False)
    order: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the matrix."""
        return self.layout.shape

    @property
    def num_outliers(self) -> int:
        """See :class:`KernelLayout`."""
        return self.layout.num_outliers

    @property
    def shard(self) -> PackedArrays:
        """The arrays of the one shard that a device sees."""
        return PackedArrays(*(None if array is None else array[0, 0] for array in map(functools.partial(getattr, self), ARRAYS)))

    def without_outliers(self, *, quantizes_input: bool) -> "KernelWeight":
        """The same weight for the inputs that are quantized, or for those that are not."""
        weight_format = dataclasses.replace(self.layout.weight_format, activations="int8" if quantizes_input else "float")
        return self.replace(layout=dataclasses.replace(self.layout, num_outliers=0, weight_format=weight_format))

    def specs(self, partition: Partition) -> "KernelWeight":
        """The ``PartitionSpec`` of each array, in its place."""
        spec = partition.spec(self.layout.array_axes)
        return self.replace(**{name: spec for name in ARRAYS if getattr(self, name) is not None})
