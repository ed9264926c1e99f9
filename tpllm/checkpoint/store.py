"""A model in an orbax store: weights as they were once loaded, dense or quantized, to be restored on any mesh with no conversion.

The folder holds config.json and the tokenizer as any checkpoint's does, ``store.json`` with the scheme and shape of every parameter, and ``weights``,
which orbax wrote (https://orbax.readthedocs.io). Parameters have our own names, and neither the repeated heads nor the padding of a mesh.
"""
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding_rules.axes import KV_HEADS, VOCAB
from tpllm.checkpoint.read import TensorReader
from tpllm.checkpoint.source import read_json
from tpllm.checkpoint.stored import RowReader, StoredMatrix
from tpllm.errors import CheckpointError
from tpllm.model.config import ModelConfig
from tpllm.model.params import DecoderParams, ParamSpec, named_leaves, param_specs
from tpllm.weights.bits import num_bytes, pack_bits, unpack_bits
from tpllm.weights.scheme import QuantizedRows, Scheme
from tpllm.weights.xla import XlaWeight

MANIFEST, WEIGHTS, VERSION = "store.json", "weights", 1
DENSE, CODES, ORDER = "array", "codes", "order"


def write_store(folder: Path, params: DecoderParams, config: ModelConfig, *, source: Mapping[str, Any]) -> None:
    """Write ``store.json`` and ``weights``; every host of the mesh writes its shards.

    Args:
        folder: where there is neither yet.
        params: plain arrays and :class:`~tpllm.weights.xla.XlaWeight`.
        config: of the model, fitted to their mesh.
        source: what tells the checkpoint they come from, JSON-able.

    Raises:
        CheckpointError: the disk is full, or cannot be written.
    """
    import orbax.checkpoint as ocp
    arrays, described = {}, {}
    for name, spec in named_leaves(param_specs(config)):
        arrays[name], described[name] = _logical(_find(params, name), spec, config)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save((folder / WEIGHTS).absolute(), arrays)
        (folder / MANIFEST).write_text(json.dumps({"version": VERSION, "source": source, "parameters": described}, indent=1) + "\n")
    except (OSError, ValueError) as error:  # tensorstore's errors are ValueErrors
        raise CheckpointError(f"{folder} cannot be written: {error}; free some space, or name another folder") from None


def _find(params: DecoderParams, name: str) -> Any:
    found: Any = params
    for part in name.split("."):
        found = found[int(part)] if part.isdecimal() else getattr(found, part)
    return found


def _logical(leaf: Any, spec: ParamSpec, config: ModelConfig) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """(the arrays to store, what the manifest says of them)."""
    rows = _logical_rows(spec, config)

    def taken(array: jax.Array) -> jax.Array:
        if rows is None:
            return array
        if array.dtype.itemsize > 1 or not jnp.issubdtype(array.dtype, jnp.floating):
            return jnp.take(array, rows, axis=0)
        as_bytes = jax.lax.bitcast_convert_type(array, jnp.uint8)  # XLA's CPU compiler makes 0 of fp8's -0
        return jax.lax.bitcast_convert_type(jnp.take(as_bytes, rows, axis=0), array.dtype)
    shape = [spec.shape[0] if rows is None else len(rows), *spec.shape[1:]]
    if not isinstance(leaf, XlaWeight):
        return {DENSE: taken(leaf)}, {"shape": shape, "dtype": str(leaf.dtype)}
    kept = leaf.layout.kept
    arrays = {name: taken(getattr(leaf, name)) for name in kept.arrays(shape[1]) if name != CODES}
    codes = taken(leaf.code_bytes())
    arrays[CODES] = pack_bits(codes, kept.bits) if kept.bits < 8 else codes
    if leaf.order is not None:
        arrays[ORDER] = leaf.order
    return arrays, {"shape": shape, "has_order": leaf.order is not None,
                    "scheme": {**dataclasses.asdict(kept), "scale_dtype": str(kept.scale_dtype)}}


def _logical_rows(spec: ParamSpec, config: ModelConfig) -> np.ndarray | None:
    """The stored row of each row of a parameter without padding and repeats; None where there are none of them."""
    if spec.stack is not None:
        rows = np.empty(spec.stack.num * spec.stack.rows, np.int32)
        for stored, matrix, start, stop in spec.stack.runs(0, spec.shape[0]):
            rows[matrix * spec.stack.rows + start:matrix * spec.stack.rows + stop] = np.arange(stored, stored + stop - start)
        return rows
    if spec.axes[0] == KV_HEADS and config.kv_repeat > 1:
        return np.arange(spec.shape[0]).reshape(-1, config.kv_repeat, config.head_dim)[:, 0].reshape(-1)
    return np.arange(config.vocab_size) if spec.axes[0] == VOCAB and config.padded_vocab_size > config.vocab_size else None


class StoreFormat:
    """See :class:`~tpllm.checkpoint.stored.CheckpointFormat`; weights are asked for by the names of our parameters.

    Attributes:
        name: ``"orbax"``.
    """

    name = "orbax"

    def __init__(self, folder: Path):
        self._folder, manifest = folder, read_json(folder, MANIFEST)
        if manifest.get("version") != VERSION or not isinstance(manifest.get("parameters"), dict):
            raise CheckpointError(f"{folder / MANIFEST}: version is {manifest.get('version')!r}; this version of tpllm reads {VERSION}. "
                                  "Write the store again")
        self._parameters: dict[str, Any] = manifest["parameters"]

    def files(self) -> list[Path]:
        """The files that hold the weights, in order."""
        return sorted(path for path in (self._folder / WEIGHTS).rglob("*") if path.is_file())

    def find(self, weight: str, shape: tuple[int, ...]) -> StoredMatrix | None:
        """See :meth:`tpllm.checkpoint.stored.CheckpointFormat.find`."""
        if weight not in self._parameters:
            return None
        try:
            description = self._parameters[weight]
            found, scheme = tuple(map(int, description["shape"])), _scheme(description.get("scheme"))
            bits = scheme.bits_per_weight(found[1]) if scheme else 8 * np.dtype(description["dtype"]).itemsize
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{self._folder / MANIFEST}: {weight}: {type(error).__name__}: {error}. Write the store again") from None
        order = self._read(weight, ORDER, (found[1],), np.dtype(np.int32)) if description.get("has_order") else None
        open_rows = self._open_dense(weight, found, description) if scheme is None else self._open_quantized(weight, found, scheme)
        return StoredMatrix((weight,), found, scheme, bits, order, open_rows)

    def _open_dense(self, weight: str, shape: tuple[int, ...], description: Mapping[str, Any]):
        def open_rows(reader: TensorReader) -> RowReader:
            array = self._read(weight, DENSE, shape, np.dtype(description["dtype"]))
            return lambda first, last: array[first:last].astype(np.float32)
        return open_rows

    def _open_quantized(self, weight: str, shape: tuple[int, ...], scheme: Scheme):
        def open_rows(reader: TensorReader) -> RowReader:
            columns = scheme.arrays(shape[1])
            if scheme.bits < 8:
                columns[CODES] = (num_bytes(shape[1], scheme.bits), scheme.code_dtype)
            arrays = {name: self._read(weight, name, (shape[0], width), dtype) for name, (width, dtype) in columns.items()}

            def rows(first: int, last: int) -> QuantizedRows:
                parts = {name: array[first:last] for name, array in arrays.items()}
                codes = unpack_bits(parts[CODES], scheme.bits, shape[1]) if scheme.bits < 8 else parts[CODES]
                return QuantizedRows(**parts | {CODES: codes})
            return rows
        return open_rows

    def _read(self, weight: str, part: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        import tensorstore
        base = f"file://{(self._folder / WEIGHTS).absolute()}/"
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{weight}.{part}/"}}
        try:
            array = tensorstore.open(spec, read=True).result()
            if tuple(array.shape) != shape or array.dtype.numpy_dtype != dtype:
                raise CheckpointError(f"{self._folder / WEIGHTS}: {weight}.{part} is {array.dtype.numpy_dtype} of shape {tuple(array.shape)}; "
                                      f"{MANIFEST} makes it {dtype} of {shape}. Write the store again")
            return array.read().result()
        except ValueError as error:
            raise CheckpointError(f"{self._folder / WEIGHTS}: {weight}.{part} cannot be read: {error}. Write the store again") from None


def _scheme(fields: Mapping[str, Any] | None) -> Scheme | None:
    return None if fields is None else Scheme(**{**fields, "scale_dtype": np.dtype(fields["scale_dtype"])})
