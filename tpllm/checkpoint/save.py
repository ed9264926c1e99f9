"""Writing a quantized checkpoint: a folder in Hugging Face's layout with compressed-tensors weights, which transformers opens too.

One matrix at a time is read, quantized and written, some rows at a time. Everything goes into a hidden folder beside the target, which gets its name
when all of it is on the disk.
"""
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tpllm.checkpoint.compress import Planned, compress, describe_groups
from tpllm.checkpoint.entries import ParamEntry, find_entries, open_rows
from tpllm.checkpoint.folder import Checkpoint, open_checkpoint
from tpllm.checkpoint.index import INDEX, SINGLE
from tpllm.checkpoint.new_folder import new_folder
from tpllm.checkpoint.read import RAW, TensorReader
from tpllm.checkpoint.safetensors import TensorEntry
from tpllm.checkpoint.store import StoreFormat
from tpllm.errors import CheckpointError, ConfigError
from tpllm.weights.policy import Quantization, parse_policy
from tpllm.weights.quantize import quantize
from tpllm.weights.scheme import Scheme, dequantize

COPIED = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.jinja", "merges.txt",
          "vocab.json", "vocab.txt")
MAX_SHARD_BYTES = 5 * 10**9
CHUNK_BYTES = 2**22
DTYPE_NAMES = {dtype: name for name, dtype in RAW.items()}


@dataclasses.dataclass(frozen=True)
class Group:
    """Tensors that are made together.

    Attributes:
        tensors: what they are.
        chunks: makes an iterator over the next rows of each, in order.
    """

    tensors: tuple[Planned, ...]
    chunks: Callable[[TensorReader], Iterator[tuple[np.ndarray, ...]]]

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def quantize_checkpoint(model: str | Path, out: str | Path, quantization: Quantization, *, revision: str | None = None,
                        max_shard_bytes: int = MAX_SHARD_BYTES) -> Path:
    """Quantize the linear layers of a checkpoint's decoder and save it; embedding, norms and head stay as they are.

    Args:
        model: as ``open_checkpoint`` takes it; no GGUF file.
        out: the new folder, which must not be there.
        quantization: as :func:`~tpllm.weights.policy.parse_policy` takes it, of schemes that compressed-tensors has: int8, w8a8, fp8, int4 and its
            larger groups.
        revision: of a hub id.
        max_shard_bytes: of one file of weights.

    Returns:
        ``out``.

    Raises:
        ConfigError: ``out`` is there, a scheme that cannot be written, or a disk that is too small.
        CheckpointError: the checkpoint cannot be read, or the folder not written.
    """
    out, policy = Path(out), parse_policy(quantization)
    if not policy.rules:
        raise ConfigError("quantization is None; name a scheme to write, such as int4")
    checkpoint = open_checkpoint(model, revision=revision)
    if checkpoint.gguf is not None:
        raise ConfigError(f"{checkpoint.folder} is a GGUF file; quantize from the safetensors checkpoint that it was made of")
    if checkpoint.weights is not None and checkpoint.weights.name == StoreFormat.name:
        raise ConfigError(f"{checkpoint.folder} is an orbax store; quantize from the checkpoint that it was made of")
    if checkpoint.family.columns:
        raise ConfigError(f"{checkpoint.folder}: {checkpoint.family.name} keeps a layer's experts in one tensor, for which compressed-tensors "
                          "has no form; quantize while loading (quantization=...), or write an orbax store")
    plan, schemes = _plan(checkpoint, lambda name: policy.choose(name))
    if not any(schemes.values()):
        raise ConfigError(f"quantization {quantization!r} quantizes no linear layer; name a scheme for some of layers.*.attn.* and layers.*.mlp.*")
    config = unquantized_config(checkpoint) | {"quantization_config": describe_groups(schemes)}
    with new_folder(out.absolute(), num_bytes=sum(group.num_bytes for group in plan)) as folder:
        _write_all(folder, plan, max_shard_bytes)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for path in copied_files(checkpoint.folder):
            shutil.copy(path, folder / path.name)
    return out


def unquantized_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json without what it says of quantized weights, and with what the weights say of the head."""
    kept = {key: value for key, value in checkpoint.hf_config.items() if key not in ("quantization_config", "compression_config")}
    return kept | {"tie_word_embeddings": checkpoint.config.ties_embeddings}


def copied_files(folder: Path) -> list[Path]:
    """The tokenizer's and the other small files that a saved model takes along."""
    return sorted({path for pattern in COPIED for path in folder.glob(pattern) if path.is_file()})


def _plan(checkpoint: Checkpoint, choose: Callable[[str], Scheme | None]) -> tuple[list[Group], dict[str, Scheme | None]]:
    """(every tensor to write, the scheme of each linear module). Parameters that lie in one tensor have one scheme."""
    tensors: dict[str, dict[str, ParamEntry]] = {}
    for name, source in find_entries(checkpoint, checkpoint.config).items():
        for index, tensor in enumerate(source.tensors):
            tensors.setdefault(checkpoint.family.checkpoint_name(name, index), {})[name] = dataclasses.replace(source, tensors=(tensor,))
    plan, schemes = [], {}
    for tensor_name, parameters in tensors.items():
        name, source = next(iter(parameters.items()))
        is_linear = name.startswith("layers.") and len(source.tensor.shape) == 2
        chosen = {choose(parameter) if is_linear else None for parameter in parameters}
        if len(chosen) > 1:
            raise ConfigError(f"{', '.join(parameters)} are one tensor, {tensor_name!r}; give them one scheme")
        scheme = chosen.pop()
        if is_linear:
            schemes[tensor_name.removesuffix(".weight")] = scheme
        plan.append(_plain(tensor_name, source) if scheme is None else _quantized(tensor_name, source, scheme))
    return plan, schemes


def _plain(name: str, source: ParamEntry) -> Group:
    if not isinstance(source.tensor, TensorEntry):  # quantized in the checkpoint, and not to be in the new one
        dtype = RAW["BF16"]
        planned = Planned(name, dtype, tuple(source.tensor.shape))
        return Group((planned,), lambda reader: ((rows.astype(dtype),) for rows in _float_rows(reader, source)))
    entry, dtype = source.tensor, RAW[source.tensor.dtype]

    def chunks(reader: TensorReader) -> Iterator[tuple[np.ndarray]]:
        if not entry.shape:
            yield (reader.read_raw(entry),)
            return
        for first, last in _steps(entry.shape, dtype):
            yield (reader.read_raw(entry, first, last),)
    return Group((Planned(name, dtype, entry.shape),), chunks)


def _quantized(name: str, source: ParamEntry, scheme: Scheme) -> Group:
    """The tensors that hold a quantized matrix."""
    shape = tuple(source.tensor.shape)
    parts = compress(scheme, shape, name)

    def chunks(reader: TensorReader) -> Iterator[tuple[np.ndarray, ...]]:
        for index, rows in enumerate(_float_rows(reader, source)):
            quantized = quantize(rows, scheme)
            yield tuple(np.array(() if index else shape, part.dtype) if part.rows_of is None else part.rows_of(quantized) for part in parts)
    return Group(tuple(parts), chunks)


def _float_rows(reader: TensorReader, source: ParamEntry) -> Iterator[np.ndarray]:
    """The whole tensor in float32, some rows at a time."""
    tensor, read = source.tensor, open_rows(source.tensor, reader)
    places = None if source.order is None else np.argsort(source.order)
    for first, last in _steps(tensor.shape, np.dtype(np.float32)):
        rows = read(first, last)
        floats = rows if isinstance(rows, np.ndarray) else dequantize(rows, tensor.scheme)
        yield floats if places is None else floats.take(places, axis=1)


def _steps(shape: tuple[int, ...], dtype: np.dtype) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))
    for first in range(0, shape[0], step):
        yield first, min(first + step, shape[0])


def _write_all(folder: Path, plan: list[Group], max_bytes: int) -> None:
    try:
        _write_shards(folder, plan, max_bytes)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}; free some space, or name another folder") from None


def _write_shards(folder: Path, plan: list[Group], max_bytes: int) -> None:
    shards: list[list[Group]] = [[]]
    for group in plan:
        if shards[-1] and sum(other.num_bytes for other in shards[-1]) + group.num_bytes > max_bytes:
            shards.append([])
        shards[-1].append(group)
    names = [f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)] if len(shards) > 1 else [SINGLE]
    with TensorReader() as reader:
        for name, groups in zip(names, shards, strict=True):
            _write_safetensors(folder / name, groups, reader)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, groups in zip(names, shards, strict=True) for group in groups for tensor in group.tensors}
        index = {"metadata": {"total_size": sum(group.num_bytes for group in plan)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_safetensors(path: Path, groups: list[Group], reader: TensorReader) -> None:
    """Header, then the tensors; see https://github.com/huggingface/safetensors#format."""
    header: dict[str, Mapping[str, Any]] = {"__metadata__": {"format": "pt"}}
    position = 0
    # Wide items first, so that each tensor begins at a multiple of its own.
    for tensor in sorted((tensor for group in groups for tensor in group.tensors), key=lambda tensor: -tensor.dtype.itemsize):
        offsets = [position, position := position + tensor.num_bytes]
        header[tensor.name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for group in groups:
            positions = [8 + len(text) + header[tensor.name]["data_offsets"][0] for tensor in group.tensors]
            for chunk in group.chunks(reader):
                for index, rows in enumerate(chunk):
                    file.seek(positions[index])
                    positions[index] += file.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
