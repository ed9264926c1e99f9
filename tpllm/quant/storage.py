"""How the matrices of a model are kept: dense or quantized, as XLA reads them or packed for the native kernels."""
import dataclasses

import numpy as np

from sharding_rules import Partition, ShardingError
from tpllm.native.packed import BLOCK, DENSE, Format, PackedLayout, PackedWeight, pack_rows
from tpllm.quant.quantized_tensor import QuantizedLayout, quantize_shard
from tpllm.quant.schemes import Scheme

FORMATS = {8: Format.I8, 4: Format.I4}
NIBBLE_ZERO = 8


@dataclasses.dataclass(frozen=True)
class Storage:
    """One model's choice.

    Attributes:
        dtype: of activations, vectors, and matrices that are not quantized.
        scheme: how matrices are quantized, or None.
        is_packed: whether they are packed for the native kernels.
    """

    dtype: np.dtype
    scheme: Scheme | None = None
    is_packed: bool = False

    def layout(self, shape: tuple[int, ...], axes: tuple[str | None, ...], partition: Partition | None, *,
               name: str) -> "PackedMatrix | QuantizedLayout | None":
        """How a parameter lies in memory; None for a plain array of ``dtype``.

        Raises:
            ShardingError: a dim that its mesh axis does not divide.
        """
        if len(shape) != 2 or (self.scheme is None and not self.is_packed):
            return None
        if partition is not None:
            partition.sharding(axes, shape=shape, name=name)
        if not self.is_packed:
            layout = QuantizedLayout(self.scheme, shape, axes, partition)
            if self.scheme.group and (shape[1] // layout.num_shards[1]) % self.scheme.group and layout.num_shards[1] > 1:
                raise ShardingError(f"{name}: a shard of {shape[1]} inputs in {layout.num_shards[1]} parts is no multiple of the group of "
                                    f"{self.scheme.group}; choose a smaller mesh")
            return layout
        if self.scheme is None:
            return PackedMatrix(PackedLayout(DENSE[self.dtype], shape, axes, partition), None)
        zero = NIBBLE_ZERO if self.scheme.bits == 4 else 0
        return PackedMatrix(PackedLayout(FORMATS[self.scheme.bits], shape, axes, partition, group=self.scheme.group, zero=zero), self.scheme)


@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """Writes rows into the arrays of a :class:`~tpllm.native.packed.PackedWeight`.

    Attributes:
        packed: the layout.
        scheme: how rows are quantized first, or None.
    """

    packed: PackedLayout
    scheme: Scheme | None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.packed.shape

    @property
    def num_shards(self) -> tuple[int, int]:
        """Into how many parts N and K are cut."""
        return self.packed.num_shards

    @property
    def partition(self) -> Partition | None:
        """Mesh and rules, or None for one device."""
        return self.packed.partition

    @property
    def source_dtype(self) -> np.dtype:
        """What :meth:`write` takes."""
        return np.dtype(np.float32) if self.scheme else next(dtype for dtype, dense in DENSE.items() if dense == self.packed.format)

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype, tuple[str | None, ...]]]:
        """(shape, dtype, logical axes) of each array."""
        dtypes = {"codes": np.dtype(np.uint8)} | ({"scales": self.scheme.scale_dtype} if self.scheme else {})
        shapes = self.packed.array_shapes()
        return {name: (shapes[name], dtype, self.packed.array_axes(name)) for name, dtype in dtypes.items()}

    def write(self, rows_NK: np.ndarray, first_row: int, shard: int, out: dict[str, np.ndarray]) -> None:
        """Quantize and pack some whole rows, from a multiple of 32 on, into the arrays of K's ``shard``."""
        width = self.shape[1] // self.num_shards[1]
        if self.scheme is None:
            pack_rows(self.packed.format, rows_NK[:, shard * width:(shard + 1) * width], out["codes"], first_row=first_row)
            return
        codes, scales = quantize_shard(rows_NK, self.scheme, shard, self.num_shards[1])
        if self.scheme.bits == 4:
            codes = codes + np.int8(NIBBLE_ZERO)
        pack_rows(self.packed.format, np.ascontiguousarray(codes), out["codes"], first_row=first_row)
        padded = np.zeros((-(-scales.shape[0] // BLOCK) * BLOCK, scales.shape[1]), scales.dtype)
        padded[:scales.shape[0]] = scales
        blocks = padded.reshape(-1, BLOCK, scales.shape[1]).transpose(0, 2, 1)
        target = out["scales"][first_row // BLOCK:first_row // BLOCK + blocks.shape[0]]
        target[...] = blocks if self.scheme.group else blocks[:, 0]

    def build(self, arrays) -> PackedWeight:
        """The weight of these arrays."""
        named = {name: arrays.get(name) for name in ("codes", "scales", "mins", "super_scales", "super_mins")}
        return PackedWeight(**named, layout=self.packed)
