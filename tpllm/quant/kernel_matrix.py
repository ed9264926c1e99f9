"""Writing quantized rows as the kernels of an accelerator read them."""
import dataclasses

import numpy as np

from pallas_kernels.quant_matmul import WeightFormat, has_rows_kernel, layout_for, pack
from pallas_kernels.tiling import Device
from sharding_rules import Partition
from sharding_rules.axes import EXPERT_MLP, EXPERTS
from tpllm.kernel_weights import ARRAYS, KernelLayout, KernelWeight
from tpllm.quant.regroup import fit_groups, regroup, shard_of
from tpllm.quant.schemes import QuantizedRows, Scheme

GROUPS = (0, 16, 32, 64, 128, 256)
TRITON_GROUPS = (32, 64, 128)  # of codes of 4 bits, the one product that GPUs without Mosaic's kernels have


@dataclasses.dataclass(frozen=True)
class KernelMatrix:
    """Writes rows into the arrays of a :class:`~tpllm.kernel_weights.KernelWeight`.

    Attributes:
        layout: how they lie.
        scheme: of the rows that are written.
        kept: the scheme with the groups that are kept.
    """

    layout: KernelLayout
    scheme: Scheme
    kept: Scheme

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.layout.shape

    @property
    def num_shards(self) -> tuple[int, int]:
        """Into how many parts N and K are cut."""
        return self.layout.num_shards

    @property
    def partition(self) -> Partition:
        """Mesh and rules."""
        return self.layout.partition

    @property
    def source_dtype(self) -> np.dtype:
        """Of the floats that are quantized."""
        return np.dtype(np.float32)

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype, tuple[str | None, ...]]]:
        """(shape, dtype, logical axes) of each array."""
        shapes = self.layout.array_shapes(self.kept.arrays(self.layout.shard_shape[1]))
        return {name: (shape, np.dtype(dtype), self.layout.array_axes) for name, (shape, dtype) in shapes.items()}

    def write(self, rows: QuantizedRows, first_row: int, shard: int, out: dict[str, np.ndarray]) -> None:
        """Pack some whole rows of ``scheme`` into the arrays of K's ``shard``; the last ones bring what N is padded with."""
        part, num_rows = shard_of(regroup(rows, self.scheme, self.kept), self.kept, shard, self.num_shards[1]), len(rows.codes)
        packed = pack(self.layout.weight_format, part.codes, part.scales, part.mins, part.super_scales, part.super_mins)
        is_last = first_row + num_rows == self.layout.shard_shape[0]
        for name, target in out.items():
            values, target = getattr(packed, name), target[0, 0]
            if not (name in ("codes", "high") and self.layout.has_outputs_first):
                values, target = values.T, target.T
            values = values if is_last else values[:num_rows]
            target[first_row:first_row + len(values)] = values

    def build(self, arrays) -> KernelWeight:
        """The weight of these arrays."""
        return KernelWeight(**{name: arrays.get(name) for name in ARRAYS}, layout=self.layout)


def kernel_matrix(scheme: Scheme, shape: tuple[int, int], axes: tuple[str | None, str | None], partition: Partition, *, device: Device,
                  name: str) -> KernelMatrix | None:
    """How a device's kernels want a matrix; None where they have none for its codes, or cannot read it otherwise: of routed
    experts, or an embedding.

    Args:
        scheme: of the rows that are to be written.
        shape, axes, partition: see :class:`~tpllm.kernel_weights.KernelLayout`.
        device: whose kernels.
        name: of the parameter, for errors.

    Raises:
        ShardingError: shards that cut groups for which no scale can be repeated.
    """
    is_known = scheme.bits in (4, 5, 6, 7, 8) and scheme.kind != "e2m1"
    if not is_known or {EXPERTS, EXPERT_MLP} & set(axes):
        return None
    kept = fit_groups(scheme, shape[1], partition.size(axes[1]), allowed=GROUPS, name=name)
    layout = layout_for(device)
    if layout == "columns" and name == "embed":  # a table of which rows are read: XLA would turn all of it over for that
        return None
    if layout == "rows" and not (kept.bits == 4 and kept.group in TRITON_GROUPS and not kept.super_group and has_rows_kernel()):
        return None
    multiplies_bytes = kept.quantizes_input and kept.kind == "int" and kept.bits == 8 and kept.group == 0
    weight_format = WeightFormat(bits=kept.bits, kind=kept.kind, group=kept.group, zero=kept.zero, mins=kept.mins, super_group=kept.super_group,
                                 activations="int8" if multiplies_bytes else "float", layout=layout)
    return KernelMatrix(KernelLayout(weight_format, device, shape, axes, partition, kept.num_outliers if multiplies_bytes else 0), scheme, kept)
