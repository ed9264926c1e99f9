"""What all formats share: the tensors of a module, checked as they are asked for, the matrix that is made of them, and reading scales."""
import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from tpllm.checkpoint.read import TensorReader
from tpllm.checkpoint.safetensors import TensorEntry
from tpllm.checkpoint.stored import RowReader, StoredMatrix
from tpllm.errors import CheckpointError, log
from tpllm.weights.scheme import E8M0_NAN, Scheme, power_scales

FLOATS = ("F16", "BF16", "F32")
E8M0 = ("U8", "F8_E8M0")
"""Dtypes of scales that are powers of two: ``2 ** (code - 127)`` (OCP Microscaling Formats 1.0, section 5.4)."""
TRANSPOSED_ROWS = 16
"""Written at a time: of int32, a cache line of the transposed matrix."""
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Module:
    """A module's tensors.

    Attributes:
        name: such as ``model.layers.0.mlp.up_proj``.
        parts: what follows the name and a dot -> tensor.
    """

    name: str
    parts: Mapping[str, TensorEntry]

    def need(self, part: str, dtypes: tuple[str, ...], *shapes: Shape) -> TensorEntry:
        """A tensor of one of some dtypes and of one of some shapes.

        Raises:
            CheckpointError: it is missing, or is neither; the message has both.
        """
        entry, wanted = self.parts.get(part), f"{' or '.join(dtypes)} of shape {' or '.join(map(str, shapes))}"
        if entry is None:
            path = next(iter(self.parts.values())).path
            raise CheckpointError(f"{path.parent}: tensor {self.name}.{part} ({wanted}) is missing, while {self.name}.{min(self.parts)} is there; "
                                  "download or convert the checkpoint again")
        if entry.dtype not in dtypes or entry.shape not in shapes:
            raise CheckpointError(f"{entry.path}: tensor {entry.name!r} is {entry.dtype} of shape {entry.shape}; it must be {wanted}, by "
                                  "config.json's sizes and quantization_config: correct that, or take the checkpoint as it was published")
        return entry

    def has_any(self, *parts: str) -> bool:
        """Whether at least one of some tensors is there."""
        return any(part in self.parts for part in parts)

    def bits_per_weight(self, shape: Shape) -> float:
        """What all tensors but the bias take for a matrix of some shape."""
        return 8 * sum(entry.num_bytes for part, entry in self.parts.items() if part != "bias") / max(1, math.prod(shape))

    def names(self) -> tuple[str, ...]:
        """The names of all tensors but the bias."""
        return tuple(entry.name for part, entry in self.parts.items() if part != "bias")


def group_by_module(tensors: Mapping[str, TensorEntry]) -> dict[str, Module]:
    """Every module that has tensors, by its name."""
    parts: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        module, _, part = name.rpartition(".")
        parts.setdefault(module, {})[part] = entry
    return {name: Module(name, entries) for name, entries in parts.items()}


def matrix_of(module: Module, shape: tuple[int, int], scheme: Scheme | None, opener: Callable[[TensorReader], RowReader],
              *, order: np.ndarray | None = None) -> StoredMatrix:
    """The matrix of a module whose tensors are all read for it."""
    return StoredMatrix(module.names(), shape, scheme, module.bits_per_weight(shape), order, opener)


@dataclasses.dataclass(frozen=True)
class ScaleLines:
    """Scales of which one line serves several rows.

    Attributes:
        entry: the tensor.
        num_groups: scales of a line.
        rows_a_line: 1 for scales of channels and groups, the height of blocks, or all rows for one scale of a tensor.
    """

    entry: TensorEntry
    num_groups: int
    rows_a_line: int = 1

    def read(self, reader: TensorReader) -> np.ndarray:
        """[lines, groups], in the file's dtype, or float32 where that is a power of two."""
        return read_scales(reader, self.entry).reshape(-1, self.num_groups)

    def index(self, first: int, last: int) -> slice | np.ndarray:
        """The lines of rows [first, last), one for each row."""
        return slice(first, last) if self.rows_a_line == 1 else np.arange(first, last) // self.rows_a_line


def read_transposed(reader: TensorReader, entry: TensorEntry) -> np.ndarray:
    """[columns, rows] of a matrix that the file holds the other way; beside it only a few rows are in memory."""
    transposed = np.empty(entry.shape[::-1], np.int32)
    for first in range(0, entry.shape[0], TRANSPOSED_ROWS):
        last = min(first + TRANSPOSED_ROWS, entry.shape[0])
        transposed[:, first:last] = reader.read_raw(entry, first, last).T
    return transposed


def read_scales(reader: TensorReader, entry: TensorEntry) -> np.ndarray:
    """A tensor of scales, in its own dtype where that is a float of 16 or 32 bits, else float32.

    Raises:
        CheckpointError: one of them is infinite or no number.
    """
    if entry.dtype in E8M0:
        return power_scales(read_exponents(reader, entry))
    scales = reader.read_raw(entry)
    scales = scales.astype(np.float32) if scales.dtype.itemsize == 1 else scales
    _check_finite(entry, np.isfinite(scales))
    return scales


def read_exponents(reader: TensorReader, entry: TensorEntry, first: int = 0, last: int | None = None) -> np.ndarray:
    """uint8: rows of a tensor of scales that are powers of two (:func:`tpllm.weights.scheme.power_scales`), none of them NaN."""
    exponents = reader.read_raw(dataclasses.replace(entry, dtype="U8"), first, last)
    _check_finite(entry, exponents != E8M0_NAN)
    return exponents


def _check_finite(entry: TensorEntry, is_finite: np.ndarray) -> None:
    if not is_finite.all():
        raise CheckpointError(f"{entry.path}: tensor {entry.name!r} holds scales that are not finite; download or convert the checkpoint again")


def complete_groups(module: Module, num_inputs: int, group: int) -> int:
    """Groups of an output: 1 where ``group`` is 0.

    Raises:
        CheckpointError: the last one is not complete.
    """
    if group and num_inputs % group:
        raise CheckpointError(f"module {module.name!r}: groups of {group} inputs do not divide its {num_inputs}, and a partial last group is not "
                              "read; correct group_size in quantization_config, or quantize with a group that divides")
    return num_inputs // group if group else 1


def group_order(reader: TensorReader, entry: TensorEntry | None, group: int) -> np.ndarray | None:
    """The inputs in the order of their groups, int32 [K], by a tensor ``g_idx`` that has each input's group; None where they are sorted.

    Raises:
        CheckpointError: a group that is not there, or one of more or fewer inputs than the others.
    """
    if entry is None or not group:
        return None
    groups_K = reader.read_raw(entry)
    num_groups = groups_K.size // group
    if np.array_equal(groups_K, np.arange(groups_K.size) // group):
        return None
    if groups_K.size and (groups_K.min() < 0 or groups_K.max() >= num_groups):
        raise CheckpointError(f"{entry.path}: tensor {entry.name!r} holds groups {groups_K.min()} to {groups_K.max()}; they must be of 0 to "
                              f"{num_groups - 1}. Download the checkpoint again")
    sizes = np.bincount(groups_K, minlength=num_groups)
    if (sizes != group).any():
        odd = int(np.flatnonzero(sizes != group)[0])
        raise CheckpointError(f"{entry.path}: tensor {entry.name!r} gives group {odd} {sizes[odd]} inputs; each must have group_size = {group}. "
                              "Partial groups are not read")
    return np.argsort(groups_K, kind="stable").astype(np.int32)


def log_dequantized(what: str, num_bytes: int) -> None:
    """One line that says what it costs to keep 4-bit weights, of so many bytes in the file, as plain arrays."""
    if num_bytes:
        log.warning("%s weights are dequantized while they are read: %.1f MiB in the file take %.1f MiB in bfloat16 and %.1f MiB in float32 "
                    "(quantization=... makes them small again)", what, num_bytes / 2**20, num_bytes * 4 / 2**20, num_bytes * 8 / 2**20)
