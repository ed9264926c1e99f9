"""How the matrices of a model are kept: dense or quantized, as XLA reads them or packed for kernels."""
import dataclasses
from collections.abc import Mapping

import numpy as np

from pallas_kernels.tiling import Device
from sharding_rules import Partition
from tpllm.native.packed import BLOCK, DENSE, Format, PackedLayout, PackedWeight, groups_of, pack_rows
from tpllm.quant.kernel_matrix import KernelMatrix, kernel_matrix
from tpllm.quant.policy import AS_STORED, Policy
from tpllm.quant.quantize import SCHEMES
from tpllm.quant.quantized_tensor import ARRAYS, QuantizedLayout
from tpllm.quant.regroup import fit_groups, regroup, shard_of
from tpllm.quant.schemes import QuantizedRows, Scheme, widened

FLOAT_FORMATS = {"e4m3": Format.E4M3, "e5m2": Format.E5M2, "e2m1": Format.E2M1}
INTEGER_FORMATS = {2: Format.Q2, 3: Format.Q3, 4: Format.I4, 5: Format.Q5, 6: Format.Q6, 8: Format.I8}


@dataclasses.dataclass(frozen=True)
class Storage:
    """One model's choice.

    Attributes:
        dtype: of activations, vectors, and matrices that are not quantized.
        policy: how matrices are quantized while they are loaded.
        is_packed: whether they are packed for the native kernels.
        stored: the schemes of the checkpoint's quantized matrices, by parameter name.
        kernels_of: an accelerator for whose kernels quantized matrices are packed; None for none.
    """

    dtype: np.dtype
    policy: Policy = AS_STORED
    is_packed: bool = False
    stored: Mapping[str, Scheme] = dataclasses.field(default_factory=dict)
    kernels_of: Device | None = None

    def layout(self, shape: tuple[int, ...], axes: tuple[str | None, ...], partition: Partition, *,
               name: str) -> "PackedMatrix | KernelMatrix | QuantizedLayout | None":
        """How a parameter lies in memory; None for a plain array of ``dtype``.

        Raises:
            ShardingError: a dim that its mesh axis does not divide, or that cuts groups where no scale can be repeated.
        """
        if len(shape) != 2:
            return None
        scheme = self.policy.choose(name, self.stored.get(name))
        if scheme is None and not self.is_packed:
            return None
        partition.sharding(axes, shape=shape, name=name)
        if not self.is_packed:
            packed = self.kernels_of and kernel_matrix(scheme, shape, axes, partition, device=self.kernels_of, name=name)
            return packed or QuantizedLayout(scheme, shape, axes, partition, name)
        if scheme is None:
            return PackedMatrix(PackedLayout(DENSE[self.dtype], shape, axes, partition), None, None)
        code_format = FLOAT_FORMATS.get(scheme.kind) or INTEGER_FORMATS[widened(scheme).bits]
        kept = fit_groups(scheme, shape[1], partition.size(axes[1]), allowed=groups_of(code_format), name=name)
        if kept.group:  # there are kernels for int8 activations where an output has one scale; without them results are closer
            kept = dataclasses.replace(kept, quantizes_input=False, num_outliers=0)
        may_be_least = code_format == Format.I8 and scheme.name not in SCHEMES  # codes of -128, which our own quantizing does not make
        packed = PackedLayout(code_format, shape, axes, partition, group=kept.group, super_group=kept.super_group,
                              zero=1 if may_be_least else kept.zero, quantizes_input=kept.quantizes_input,
                              num_outliers=kept.num_outliers)
        return PackedMatrix(packed, scheme, kept)


@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """Writes rows into the arrays of a :class:`~tpllm.native.packed.PackedWeight`.

    Attributes:
        packed: the layout.
        scheme: of the rows that are written, or None for floats.
        kept: the scheme with the groups that are kept.
    """

    packed: PackedLayout
    scheme: Scheme | None
    kept: Scheme | None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.packed.shape

    @property
    def num_shards(self) -> tuple[int, int]:
        """Into how many parts N and K are cut."""
        return self.packed.num_shards

    @property
    def partition(self) -> Partition:
        """Mesh and rules."""
        return self.packed.partition

    @property
    def source_dtype(self) -> np.dtype:
        """Of the floats that are packed or quantized."""
        return np.dtype(np.float32) if self.scheme else next(dtype for dtype, dense in DENSE.items() if dense == self.packed.format)

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype, tuple[str | None, ...]]]:
        """(shape, dtype, logical axes) of each array."""
        dtypes = {"codes": np.dtype(np.uint8)}
        if self.kept is not None:
            dtypes = {name: dtype for name, (_, dtype) in self.kept.arrays(self.shape[1]).items()} | dtypes
        shapes = self.packed.array_shapes()
        return {name: (shapes[name], dtype, self.packed.array_axes(name)) for name, dtype in dtypes.items()}

    def write(self, rows: np.ndarray | QuantizedRows, first_row: int, shard: int, out: dict[str, np.ndarray]) -> None:
        """Pack some whole rows, from a multiple of 32 on, into the arrays of K's ``shard``: floats in ``source_dtype``, or rows of ``scheme``."""
        num_shards = self.num_shards[1]
        if self.scheme is None:
            width = self.shape[1] // num_shards
            pack_rows(self.packed.format, rows[:, shard * width:(shard + 1) * width], out["codes"], first_row=first_row)
            return
        part = shard_of(regroup(rows, self.scheme, self.kept), self.kept, shard, num_shards)
        pack_rows(self.packed.format, np.ascontiguousarray(part.codes), out["codes"], first_row=first_row)
        for name, values in part.arrays().items():
            if name != "codes" and values is not None:
                _write_scales(values, first_row, out[name])

    def build(self, arrays) -> PackedWeight:
        """The weight of these arrays."""
        return PackedWeight(**{name: arrays.get(name) for name in ARRAYS}, layout=self.packed)


def _write_scales(values_NG: np.ndarray, first_row: int, out: np.ndarray) -> None:
    """Into [blocks, groups, 32], or [blocks, 32] where an output has one; padding is zeros."""
    num_blocks, num_groups = -(-values_NG.shape[0] // BLOCK), out.shape[1] if out.ndim == 3 else 1
    padded = np.zeros((num_blocks * BLOCK, num_groups), values_NG.dtype)
    padded[:values_NG.shape[0], :values_NG.shape[1]] = values_NG
    blocks = padded.reshape(num_blocks, BLOCK, num_groups).transpose(0, 2, 1)
    out[first_row // BLOCK:first_row // BLOCK + num_blocks] = blocks if out.ndim == 3 else blocks[:, 0]
