"""Loading parameters by shard: every device's slice is read from the files into the memory it stays in."""
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from tpllm.checkpoint.convert import TARGETS
from tpllm.checkpoint.entries import ParamEntry, find_entries, open_rows, order_of, warn_unused
from tpllm.checkpoint.folder import Checkpoint
from tpllm.checkpoint.placement import Bounds, fill_by_rows, make_matrix, place
from tpllm.checkpoint.read import Rectangle, TensorReader
from tpllm.checkpoint.safetensors import TensorEntry
from tpllm.checkpoint.stored import StoredMatrix
from tpllm.errors import CheckpointError, log
from tpllm.model.config import ModelConfig
from tpllm.model.params import DecoderParams, ParamSpec, map_specs, named_leaves, param_specs
from tpllm.weights.scheme import QuantizedRows, Scheme, dequantize, join_rows
from tpllm.weights.storage import Storage

Rows = np.ndarray | QuantizedRows


def load_params(checkpoint: Checkpoint, config: ModelConfig, *, dtype: Any, storage: Storage | None = None,
                entries: Mapping[str, ParamEntry] | None = None) -> DecoderParams:
    """The parameters of a checkpoint, on the devices and in the layout that ``config`` asks for.

    One tensor is read at a time, by several threads. On CPU the arrays are the buffers that were read into, and replicas share one; so the
    peak of host memory is the weights plus a few blocks of 2 MB. Elsewhere it is the local slices of one tensor.

    Args:
        checkpoint: an open checkpoint.
        config: its ``config`` fitted to a mesh, or as it is for the default device.
        dtype: of every parameter: float32, bfloat16 or float16.
        storage: how matrices are kept, in that dtype where they are not quantized; None for plain arrays.
        entries: of ``find_entries``, where it was called before: it may read zeros and orders of columns.

    Raises:
        CheckpointError: a tensor missing, of the wrong shape or dtype (named, before anything is read), or a failed read.
    """
    dtype = np.dtype(dtype)
    if dtype not in TARGETS:
        raise CheckpointError(f"weights cannot be loaded as {dtype}; take one of {', '.join(map(str, TARGETS))}")
    entries = find_entries(checkpoint, config) if entries is None else entries
    warn_unused(checkpoint, entries)
    with TensorReader() as reader:
        def load(name: str, spec: ParamSpec) -> Any:
            source, layout = entries[name], storage and storage.layout(spec.shape, spec.axes, config.partition, name=name)
            if layout is not None:
                read = _row_reader(reader, source, spec, config, scheme=layout.scheme, dtype=layout.source_dtype)
                weight, order = make_matrix(layout, read, reader.pool), source.order
                return weight if order is None or source.scheme != layout.scheme else weight.replace(order=_replicated(order, config))
            sharding = config.partition.sharding(spec.axes, shape=spec.shape, name=name)
            return place(spec.shape, sharding, dtype=dtype, fill=_filler(reader, source, spec, config))
        return map_specs(load, param_specs(config))


def stored_schemes(entries: Mapping[str, ParamEntry], config: ModelConfig) -> dict[str, Scheme]:
    """The schemes of those parameters that can stay as the checkpoint keeps them: all but matrices whose columns are out of order (GPTQ's
    act-order) and which the mesh cuts between columns."""
    axes = {name: spec.axes for name, spec in named_leaves(param_specs(config))}
    is_cut = {name: len(axes[name]) > 1 and config.partition.size(axes[name][1]) > 1 for name in entries}
    lost = [name for name, source in entries.items() if source.order is not None and is_cut[name]]
    if lost:
        log.warning("%d matrices in act-order (%s, ...) are dequantized, for the mesh cuts them between columns; with tp=1 they stay small",
                    len(lost), lost[0])
    return {name: source.scheme for name, source in entries.items() if source.scheme is not None and name not in lost}


def _replicated(order_K: np.ndarray, config: ModelConfig) -> jax.Array:
    return jax.device_put(order_K, config.partition.sharding((None,)))


def _filler(reader: TensorReader, source: ParamEntry, spec: ParamSpec, config: ModelConfig) -> Callable[[Mapping[Bounds, np.ndarray]], None]:
    """What writes the slices of a plain array."""
    def fill(buffers: Mapping[Bounds, np.ndarray]) -> None:
        pieces: dict[int, list[Rectangle]] = {}
        for bounds, buffer in buffers.items():
            for tensor, piece in _pieces(bounds, buffer, source, spec, config):
                pieces.setdefault(tensor, []).append(piece)
        for tensor, of_it in pieces.items():
            reader.read(source.tensors[tensor], of_it)

    def fill_from_matrices(buffers: Mapping[Bounds, np.ndarray]) -> None:
        dtype = next(iter(buffers.values())).dtype
        fill_by_rows(buffers, _row_reader(reader, source, spec, config, scheme=None, dtype=dtype))
    return fill if source.is_plain else fill_from_matrices


def _row_reader(reader: TensorReader, source: ParamEntry, spec: ParamSpec, config: ModelConfig, *, scheme: Scheme | None,
                dtype: np.dtype) -> Callable[[int, int], Rows]:
    """A function of stored rows [first, last): rows of ``scheme`` where the checkpoint keeps them so, else floats of ``dtype``."""
    def read_plain(first: int, last: int) -> np.ndarray:
        rows = np.empty((last - first, *spec.shape[1:]), dtype)
        bounds = ((first, last), *((0, size) for size in spec.shape[1:]))
        for tensor, piece in _pieces(bounds, rows, source, spec, config):
            reader.read_here(source.tensors[tensor], [piece])
        return rows
    if source.is_plain:
        return read_plain
    readers = functools.cache(lambda index: open_rows(source.tensors[index], reader))  # each is opened when it is first asked for

    def read_stored(first: int, last: int) -> Rows:
        parts = [(stored - first, tensor, readers(tensor)(start, stop)) for stored, tensor, start, stop in source.runs(first, last, spec, config)]
        if source.scheme is not None and source.scheme == scheme:
            return join_rows([(at, part) for at, _, part in parts], last - first, scheme, spec.shape[1])
        rows = np.zeros((last - first, *spec.shape[1:]), dtype)
        for at, tensor, part in parts:
            floats = part if isinstance(part, np.ndarray) else dequantize(part, source.tensors[tensor].scheme)
            _cast(floats, rows[at:at + len(floats)], source.tensors[tensor])
        return rows
    return read_stored


def _cast(values: np.ndarray, out: np.ndarray, tensor: TensorEntry | StoredMatrix) -> None:
    order = order_of(tensor)
    try:
        with np.errstate(over="raise"):
            out[... if order is None else (slice(None), order)] = values
    except FloatingPointError:
        name = tensor.name if isinstance(tensor, TensorEntry) else tensor.names[0]
        raise CheckpointError(f"tensor {name!r} holds values beyond the range of {out.dtype}; load it as bfloat16 or float32") from None


def _pieces(bounds: Bounds, buffer: np.ndarray, source: ParamEntry, spec: ParamSpec, config: ModelConfig) -> Iterator[tuple[int, Rectangle]]:
    """What one slice of a plain parameter is made of, and of which tensor; rows of padding are set to zero here."""
    columns = bounds[1] if len(bounds) > 1 else (0, 1)
    out = buffer.reshape(buffer.shape[0], columns[1] - columns[0])
    first, filled = bounds[0][0], 0
    for stored, tensor, start, stop in source.runs(*bounds[0], spec, config):
        out[filled:stored - first] = 0
        filled = stored - first + stop - start
        yield tensor, Rectangle((start, stop), columns, out[stored - first:filled])
    out[filled:] = 0
