"""Loading parameters by shard: every device's slice is read from the files into the memory it stays in."""
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from sharding_rules.axes import KV_HEADS
from tpllm.checkpoint.convert import TARGETS
from tpllm.checkpoint.folder import Checkpoint
from tpllm.checkpoint.matrices import make_matrix
from tpllm.checkpoint.placement import Bounds, place
from tpllm.checkpoint.read import Piece, TensorReader
from tpllm.checkpoint.safetensors import TensorEntry
from tpllm.errors import CheckpointError
from tpllm.model.config import ModelConfig
from tpllm.model.params import DecoderParams, ParamSpec, map_specs, named_leaves, param_specs
from tpllm.quant.quantized_tensor import QuantizedLayout, QuantizedTensor
from tpllm.quant.storage import PackedMatrix, PackedWeight, Storage

HARMLESS = ("rotary_emb.inv_freq",)
QUANTIZED = (".qweight", ".weight_scale", ".weight_scale_inv", ".weight_packed")
NUM_NAMED = 5

log = logging.getLogger("tpllm")


def load_params(checkpoint: Checkpoint, config: ModelConfig, *, dtype: Any, storage: Storage | None = None) -> DecoderParams:
    """The parameters of a checkpoint, on the devices and in the layout that ``config`` asks for.

    One tensor is read at a time, by several threads. On CPU the arrays are the buffers that were read into, and replicas share one; so the
    peak of host memory is the weights plus a few blocks of 2 MB. Elsewhere it is the local slices of one tensor.

    Args:
        checkpoint: an open checkpoint.
        config: its ``config`` fitted to a mesh, or as it is for the default device.
        dtype: of every parameter: float32, bfloat16 or float16.
        storage: how matrices are kept, in that dtype where they are not quantized; None for plain arrays.

    Raises:
        CheckpointError: a tensor missing, of the wrong shape or dtype (named, before anything is read), quantized weights, or a failed read.
    """
    dtype = np.dtype(dtype)
    if dtype not in TARGETS:
        raise CheckpointError(f"weights cannot be loaded as {dtype}; take one of {', '.join(map(str, TARGETS))}")
    refuse_quantized(checkpoint)
    entries = find_entries(checkpoint, config)
    _warn_unused(checkpoint, entries)
    with TensorReader() as reader:
        def load(name: str, spec: ParamSpec) -> Any:
            layout = storage and storage.layout(spec.shape, spec.axes, config.partition, name=name)
            if layout is None:
                return _load_one(reader, entries[name], spec, config=config, name=name, dtype=dtype)
            return _load_matrix(reader, entries[name], spec, layout, config)
        return map_specs(load, param_specs(config))


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise ``CheckpointError`` for weights that are more than plain arrays."""
    quantization = checkpoint.hf_config.get("quantization_config") or checkpoint.hf_config.get("compression_config")
    marked = next((name for name in checkpoint.tensors if name.endswith(QUANTIZED)), None)
    if quantization or marked:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        reason = f"quant_method {method!r}" if quantization else f"tensor {marked!r}"
        raise CheckpointError(f"{checkpoint.folder}: the weights are quantized ({reason}); quantized checkpoints come in a later version: "
                              "take the unquantized one")


def find_entries(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, TensorEntry]:
    """Parameter name -> its tensor, shapes checked against the model's own, without repeated heads and padding.

    Raises:
        CheckpointError: a tensor that is missing or of another shape; it names the tensor and both shapes.
    """
    logical = param_specs(dataclasses.replace(config, kv_repeat=1, padded_vocab_size=config.vocab_size))
    found = {}
    for name, spec in named_leaves(logical):
        wanted = checkpoint.family.checkpoint_name(name)
        entry = checkpoint.tensors.get(wanted)
        if entry is None:
            hint = "; if the head is the embedding, set tie_word_embeddings to true in config.json" if name == "head" else ""
            raise CheckpointError(f"{checkpoint.folder}: tensor {wanted!r} of shape {spec.shape} is missing{hint}")
        if entry.shape != spec.shape:
            raise CheckpointError(f"{entry.path}: tensor {wanted!r} has shape {entry.shape}; config.json makes it {spec.shape}")
        found[name] = entry
    return found


def _warn_unused(checkpoint: Checkpoint, entries: dict[str, TensorEntry]) -> None:
    known = {entry.name for entry in entries.values()}
    if checkpoint.config.ties_embeddings:
        known.add(checkpoint.family.checkpoint_name("head"))
    unused = [name for name in checkpoint.tensors if name not in known and not name.endswith(HARMLESS)]
    if unused:
        log.warning("%s: %d tensors are not part of a %s model and are not read: %s%s", checkpoint.folder, len(unused), checkpoint.family.name,
                    ", ".join(unused[:NUM_NAMED]), ", ..." if len(unused) > NUM_NAMED else "")


def _load_one(reader: TensorReader, entry: TensorEntry, spec: ParamSpec, *, config: ModelConfig, name: str, dtype: np.dtype) -> jax.Array:
    """One parameter: a buffer for every different slice the local devices hold, filled, and made one array."""
    sharding = (jax.sharding.SingleDeviceSharding(jax.local_devices()[0]) if config.partition is None
                else config.partition.sharding(spec.axes, shape=spec.shape, name=name))

    def fill(buffers: Mapping[Bounds, np.ndarray]) -> None:
        reader.read(entry, [piece for bounds, buffer in buffers.items() for piece in _pieces(bounds, buffer, entry=entry, spec=spec, config=config)])
    return place(spec.shape, sharding, dtype=dtype, fill=fill)


def _load_matrix(reader: TensorReader, entry: TensorEntry, spec: ParamSpec, layout: PackedMatrix | QuantizedLayout,
                 config: ModelConfig) -> PackedWeight | QuantizedTensor:
    """One matrix that is quantized or packed on the way; its rows are read whole, once."""
    def read_rows(first: int, last: int) -> np.ndarray:
        bounds = ((first, last), (0, spec.shape[1]))
        rows = np.empty((last - first, spec.shape[1]), layout.source_dtype)
        reader.read_here(entry, _pieces(bounds, rows, entry=entry, spec=spec, config=config))
        return rows
    return make_matrix(layout, read_rows, reader.pool)


def _pieces(bounds: Bounds, buffer: np.ndarray, *, entry: TensorEntry, spec: ParamSpec,
            config: ModelConfig) -> Iterator[Piece]:
    """What one slice of a parameter is made of; rows of padding are set to zero here."""
    columns = bounds[1] if len(bounds) > 1 else (0, 1)
    out = buffer.reshape(buffer.shape[0], columns[1] - columns[0])
    first = bounds[0][0]
    is_repeated = spec.axes[0] == KV_HEADS and config.kv_repeat > 1
    runs = _repeated_rows(*bounds[0], config) if is_repeated else [(first, first, min(bounds[0][1], entry.shape[0]))]
    filled = 0
    for stored, start, stop in runs:
        if stop > start:
            filled = stored - first + stop - start
            yield Piece((start, stop), columns, out[stored - first:filled])
    out[filled:] = 0


def _repeated_rows(start: int, stop: int, config: ModelConfig) -> Iterator[tuple[int, int, int]]:
    """(first stored row, source rows from, to) for each head of stored rows [start, stop): stored head j is source head j // kv_repeat."""
    while start < stop:
        head, within = divmod(start, config.head_dim)
        length = min(config.head_dim - within, stop - start)
        source = head // config.kv_repeat * config.head_dim + within
        yield start, source, source + length
        start += length
