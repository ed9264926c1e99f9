"""Which tensor of a checkpoint each parameter comes from, and which of its rows."""
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sharding_rules.axes import KV_HEADS
from tpllm.checkpoint.columns import every_nth, plain_rows
from tpllm.checkpoint.folder import Checkpoint
from tpllm.checkpoint.read import TensorReader
from tpllm.checkpoint.safetensors import BITS, TensorEntry
from tpllm.checkpoint.settle import sizes_of_strangers
from tpllm.checkpoint.stored import RowReader, StoredMatrix
from tpllm.errors import CheckpointError, log
from tpllm.families.family import Columns
from tpllm.model.config import ModelConfig
from tpllm.model.params import ParamSpec, named_leaves, param_specs
from tpllm.weights.scheme import Scheme

_LAYER = re.compile(r"^layers\.\d+\.")
HARMLESS = ("rotary_emb.inv_freq",)
NUM_NAMED = 5


@dataclasses.dataclass(frozen=True)
class ParamEntry:
    """Where a parameter's values lie.

    Attributes:
        tensors: plain tensors, or quantized matrices: one, or one for each of the matrices that are stacked in the parameter.
        first: the row that the parameter begins with; not 0 in fused projections.
        num_rows: the parameter's rows in each tensor, before repeats and padding.
    """

    tensors: tuple[TensorEntry | StoredMatrix, ...]
    first: int
    num_rows: int

    @property
    def tensor(self) -> TensorEntry | StoredMatrix:
        """The first of them: all are of one shape."""
        return self.tensors[0]

    @property
    def is_plain(self) -> bool:
        """Whether none is quantized."""
        return all(isinstance(tensor, TensorEntry) for tensor in self.tensors)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors in the file."""
        return tuple(name for tensor in self.tensors for name in ((tensor.name,) if isinstance(tensor, TensorEntry) else tensor.names))

    @property
    def scheme(self) -> Scheme | None:
        """The scheme of quantized matrices; None where stacked ones differ, or have columns out of order: they become floats."""
        schemes = {None if isinstance(tensor, TensorEntry) else tensor.scheme for tensor in self.tensors}
        is_alike = len(schemes) == 1 and (len(self.tensors) == 1 or all(order_of(tensor) is None for tensor in self.tensors))
        return next(iter(schemes)) if is_alike else None

    @property
    def order(self) -> np.ndarray | None:
        """The order of a quantized matrix's columns, where they are out of order and it can stay quantized."""
        return order_of(self.tensor) if len(self.tensors) == 1 else None

    @property
    def kind(self) -> str:
        """What the file keeps it as: a dtype, or a quantized matrix's scheme."""
        if self.is_plain:
            return self.tensor.dtype
        is_lone = len(self.tensors) == 1 and not isinstance(self.tensor, TensorEntry)
        return self.tensor.kind if is_lone else "dequantized" if self.scheme is None else self.scheme.name

    @property
    def bits_per_weight(self) -> float:
        """What a value takes in the file, scales included."""
        bits = [BITS[tensor.dtype] if isinstance(tensor, TensorEntry) else tensor.bits_per_weight for tensor in self.tensors]
        return sum(bits) / len(bits)

    @property
    def num_values(self) -> int:
        """The number of values of the parameter, before repeats and padding."""
        return len(self.tensors) * self.num_rows * math.prod(self.tensor.shape[1:])

    def runs(self, first: int, last: int, spec: ParamSpec, config: ModelConfig) -> Iterator[tuple[int, int, int, int]]:
        """(stored row, which tensor, its row from, to) of the stored rows [first, last); rows of padding have none."""
        if spec.stack is not None:
            for stored, matrix, start, stop in spec.stack.runs(first, last):
                tensor, base = (matrix, 0) if len(self.tensors) > 1 else (0, matrix * spec.stack.rows)
                yield stored, tensor, base + start, base + stop
            return
        is_repeated = spec.axes[0] == KV_HEADS and config.kv_repeat > 1
        runs = _repeated_rows(first, last, config) if is_repeated else [(first, first, min(last, self.num_rows))]
        for stored, start, stop in runs:
            if stop > start:
                yield stored, 0, self.first + start, self.first + stop


def order_of(tensor: TensorEntry | StoredMatrix) -> np.ndarray | None:
    """The order of a quantized matrix's columns, where they are out of order."""
    return None if isinstance(tensor, TensorEntry) else tensor.order


def open_rows(tensor: TensorEntry | StoredMatrix, reader: TensorReader) -> RowReader:
    """Rows of a quantized matrix as they are, of a plain tensor as float32."""
    return tensor.open(reader) if isinstance(tensor, StoredMatrix) else lambda first, last: reader.read_raw(tensor, first, last).astype(np.float32)


def _repeated_rows(start: int, stop: int, config: ModelConfig) -> Iterator[tuple[int, int, int]]:
    """(first stored row, source rows from, to) for each head of stored rows [start, stop): stored head j is source head j // kv_repeat."""
    while start < stop:
        head, within = divmod(start, config.head_dim)
        length = min(config.head_dim - within, stop - start)
        source = head // config.kv_repeat * config.head_dim + within
        yield start, source, source + length
        start += length


def find_entries(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, ParamEntry]:
    """Parameter name -> its source, shapes checked against the model's own, without repeated heads and padding.

    A bias that no layer of the file has is zero, with a warning; one that only some layers lack is missing.

    Raises:
        CheckpointError: a tensor that is missing or of another shape; it names the tensor and both shapes.
    """
    logical = named_leaves(param_specs(dataclasses.replace(config, kv_repeat=1, padded_vocab_size=config.vocab_size)))
    absent = _absent_biases(checkpoint, logical)
    return {name: _zeros(spec) if _LAYER.sub("", name) in absent else _find(checkpoint, name, spec, config) for name, spec in logical}


def _absent_biases(checkpoint: Checkpoint, logical: list[tuple[str, ParamSpec]]) -> set[str]:
    """Biases of which the checkpoint has none in any layer, by their names without the layer; said once in the log.

    Not where it has a tensor of their size that nothing reads: that may be one under a damaged name.
    """
    found: dict[str, bool] = {}
    biases = [(_LAYER.sub("", name), name, spec) for name, spec in logical if name.endswith("_bias")]
    strangers = sizes_of_strangers(checkpoint.tensors, checkpoint.family) if biases else set()
    for kind, name, spec in biases:
        if not found.get(kind):
            stored = checkpoint.family.checkpoint_names(name, spec.stack)
            found[kind] = _num_values(spec) in strangers or any(_has(checkpoint, each, spec.shape) for each in stored)
    absent = {kind for kind, is_there in found.items() if not is_there}
    if absent:
        log.warning("%s: config.json asks for biases that the file has in no layer (%s); they are zero, as in transformers", checkpoint.folder,
                    ", ".join(sorted(absent)))
    return absent


def _has(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> bool:
    return name in checkpoint.tensors or (checkpoint.weights is not None and checkpoint.weights.find(name, shape) is not None)


def _num_values(spec: ParamSpec) -> int:
    """The number of values of a bias, without padding."""
    return spec.shape[0] if spec.stack is None else spec.stack.rows * spec.stack.num


def _zeros(spec: ParamSpec) -> ParamEntry:
    """A bias that no file has."""
    num_rows = _num_values(spec)
    zeros = StoredMatrix((), (num_rows,), None, 0.0, None, lambda reader: lambda first, last: np.zeros(last - first, np.float32), kind="zeros")
    return ParamEntry((zeros,), 0, num_rows)


def _find(checkpoint: Checkpoint, name: str, spec: ParamSpec, config: ModelConfig) -> ParamEntry:
    names, shape, first = checkpoint.family.checkpoint_names(name, spec.stack), spec.shape, 0
    if spec.stack is not None:
        shape = (spec.stack.rows * (1 if len(names) > 1 else spec.stack.num), *shape[1:])
        if (columns := checkpoint.family.columns_of(name)) is not None:
            return ParamEntry((_find_columns(checkpoint, names[0], shape, columns),), 0, shape[0])
        return ParamEntry(tuple(_find_tensor(checkpoint, wanted, shape, "", is_stack=True) for wanted in names), 0, shape[0])
    if (fused := checkpoint.family.row_range(name, config)) is not None:
        first, stop, total = fused
        if stop - first != shape[0]:
            raise CheckpointError(f"{checkpoint.folder}: tensor {names[0]!r} has {stop - first} rows for {name}; config.json makes it {shape[0]}")
        shape = (total, *shape[1:])
    hint = "; if the head is the embedding, set tie_word_embeddings to true in config.json" if name == "head" else ""
    return ParamEntry((_find_tensor(checkpoint, names[0], shape, hint),), first, spec.shape[0])


def _find_columns(checkpoint: Checkpoint, wanted: str, shape: tuple[int, ...], columns: Columns) -> StoredMatrix:
    """The rows of a parameter that are ``columns`` of a tensor of floats, or as many rows of a quantized matrix."""
    whole = (shape[0] * columns.every, *shape[1:])
    tensor: Any = _find_any(checkpoint, wanted, whole, "")
    return every_nth(plain_rows(tensor, whole) if isinstance(tensor, TensorEntry) else tensor, columns, shape[0])


def _find_any(checkpoint: Checkpoint, wanted: str, shape: tuple[int, ...], hint: str) -> TensorEntry | StoredMatrix:
    tensor: Any = checkpoint.weights.find(wanted, shape) if checkpoint.weights is not None else None
    tensor = checkpoint.tensors.get(wanted) if tensor is None else tensor
    if tensor is None:
        fix = hint or "; download or copy the checkpoint again"
        raise CheckpointError(f"{checkpoint.folder}: tensor {wanted!r} of shape {shape} is missing{fix}")
    return tensor


def _find_tensor(checkpoint: Checkpoint, wanted: str, shape: tuple[int, ...], hint: str, *, is_stack: bool = False) -> TensorEntry | StoredMatrix:
    tensor = _find_any(checkpoint, wanted, shape, hint)
    if isinstance(tensor, TensorEntry) and ((math.prod(tensor.shape[:-1]), *tensor.shape[-1:]) == shape or
                                            (is_stack and (math.prod(tensor.shape),) == shape)):
        return dataclasses.replace(tensor, shape=shape)  # experts [E, N, K] are the rows of one matrix, and a vector may be the only one
    if tuple(tensor.shape) != shape:
        where = tensor.path if isinstance(tensor, TensorEntry) else checkpoint.folder
        raise CheckpointError(f"{where}: tensor {wanted!r} has shape {tuple(tensor.shape)}; config.json makes it {shape}")
    return tensor


def warn_unused(checkpoint: Checkpoint, entries: Mapping[str, ParamEntry]) -> None:
    """Name the tensors that no parameter comes from, in the log."""
    known = {name for source in entries.values() for name in source.names}
    if checkpoint.config.ties_embeddings:
        known.add(checkpoint.family.checkpoint_name("head"))
    unused = [name for name in checkpoint.tensors if name not in known and not name.endswith(HARMLESS)]
    if unused:
        log.warning("%s: %d tensors are not part of a %s model and are not read: %s%s", checkpoint.folder, len(unused), checkpoint.family.name,
                    ", ".join(unused[:NUM_NAMED]), ", ..." if len(unused) > NUM_NAMED else "")
