"""What a product on a Hopper GPU is specialized for, and how it is cut into blocks."""
import dataclasses
import functools
import itertools

from jax.experimental import pallas as pl

from pallas_kernels.quant_matmul.byte_codes import BLOCK
from pallas_kernels.quant_matmul.packing import WeightFormat
from pallas_kernels.quant_matmul.warp_group import ROWS

WIDEST_SLICE = 64
SPLIT_INPUTS = 512
"""What a part of K has at least."""
PROCESSORS = 132
"""The multiprocessors of an H100 or H200; each runs one block at a time."""
SPLIT_ROWS = 32
"""Up to so many rows the parts of K run side by side."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What a block works on.

    Attributes:
        rows: of activations: 8, 16, 32, 64, 128 or 256.
        warp_groups: that multiply, each 64 outputs.
        inputs: of one step: 128 or 256.
        steps: that are on the way from main memory.
    """

    rows: int
    warp_groups: int
    inputs: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that the kernel is specialized for; N and K as the weight is packed, M whole tiles."""

    format: WeightFormat
    num_rows: int
    num_outputs: int
    num_inputs: int
    dtype: str
    out_dtype: str
    tiles: Tiles
    has_bias: bool
    interpret: bool

    @property
    def num_parts(self) -> int:
        return num_parts(self.num_outputs, self.num_inputs, self.format)

    @property
    def has_partial_sums(self) -> bool:
        """Whether blocks write sums of parts of K, and not results."""
        return self.num_parts > 1 and self.tiles.rows <= SPLIT_ROWS

    @property
    def sum_dtype(self) -> str:
        """The dtype of a warp group's sums."""
        return "int32" if self.format.activations == "int8" else "float32"

    @property
    def parts_in_turn(self) -> int:
        """Parts of K that a block sums apart, one after the other; sums of integers are the same in any order."""
        return 1 if self.has_partial_sums or self.format.activations == "int8" else self.num_parts

    @property
    def slice_width(self) -> int:
        """Inputs that have one scale, and are multiplied together."""
        return BLOCK if self.format.activations != "float" else min(self.format.group or WIDEST_SLICE, WIDEST_SLICE)


def num_parts(num_outputs: int, num_inputs: int, weight_format: WeightFormat) -> int:
    """Into how many parts K is cut."""
    return _split(num_outputs, num_inputs, weight_format)[1]


@functools.cache
def _split(num_outputs: int, num_inputs: int, weight_format: WeightFormat) -> tuple[int, int]:
    """(warp groups of a block, parts of K) that keep the processors evenly busy, with few rows; of equals the largest blocks and fewest parts."""
    def share(warp_groups: int, parts: int) -> float:
        blocks = num_outputs // ROWS // warp_groups * parts
        return blocks / (pl.cdiv(blocks, PROCESSORS) * PROCESSORS)
    block = max(2 * BLOCK, weight_format.block)
    parts = [1] + [2**i for i in range(1, 5) if num_inputs % (2**i * block) == 0 and num_inputs >> i >= SPLIT_INPUTS]
    choices = [(warp_groups, count) for count in parts for warp_groups in (4, 3, 2, 1) if num_outputs % (ROWS * warp_groups) == 0]
    return max(choices, key=lambda choice: round(share(*choice) - 0.01 * choice[1] - 0.05 * (4 - choice[0]), 3))


def candidates(num_rows: int, num_outputs: int, num_inputs: int, weight_format: WeightFormat) -> list[Tiles]:
    """Tiles for these shapes, the best known first."""
    warp_groups, parts = _split(num_outputs, num_inputs, weight_format)
    f, narrowest = weight_format, 32 if weight_format.activations == "e4m3" and weight_format.group else 8
    rows = next((rows for rows in (8, 16, 32, 64) if max(num_rows, narrowest) <= rows), 128)
    if rows <= SPLIT_ROWS:
        found = [Tiles(rows, *choice) for choice in itertools.product((warp_groups, 4, 3, 2, 1), (128, 256), (6, 8, 4, 3))]
    else:
        row_choices = (rows,) if rows == 64 else (128, 64) if parts > 1 else (256, 128, 64)
        found = [Tiles(*choice) for choice in itertools.product(row_choices, (2, 1), (128, 256), (4, 3, 2))]
    code_block, part = 2 * BLOCK if f.bits == 5 else BLOCK, num_inputs // parts
    copied = 2 * ROWS if "zeros" in f.mins else 0  # no copy may be of fewer bytes than a warp group has threads
    return [tiles for tiles in dict.fromkeys(found)
            if num_outputs % (ROWS * tiles.warp_groups) == 0 and part % tiles.inputs == 0 and tiles.inputs % code_block == 0
            and tiles.warp_groups * ROWS * pl.cdiv(tiles.inputs, f.group or tiles.inputs) >= copied]


def on_chip_bytes(tiles: Tiles, weight_format: WeightFormat) -> int:
    """Shared memory of a block."""
    f, outputs = weight_format, tiles.warp_groups * ROWS
    codes = tiles.inputs * outputs * f.bits // 8
    groups, supers = (pl.cdiv(tiles.inputs, group) if group else 0 for group in (f.group, f.super_group))
    scales = outputs * (1 if f.mins == "none" else 2) * ((groups + 2 * supers) if supers else 4 * groups)
    activations = tiles.rows * tiles.inputs * (2 if f.activations == "float" else 1) + 4 * tiles.rows
    return tiles.steps * (codes + scales + activations) + 4 * tiles.rows * outputs + 4096
