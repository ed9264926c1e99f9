"""The GGUF format: metadata, a table of tensors, then their values at aligned offsets (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

Nothing in the file is trusted: every count, length, shape and offset is checked before it is used. A model may be split into numbered files.
"""
import dataclasses
import hashlib
import io
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tpllm.checkpoint.gguf.cursor import AGAIN, MAX_KEY_BYTES, Cursor, Value
from tpllm.checkpoint.gguf.ggml_types import GGML_TYPES, GgmlType
from tpllm.checkpoint.safetensors import Header, TensorEntry, open_regular, read_exactly
from tpllm.errors import CheckpointError, short

MAGIC, VERSIONS, MAX_DIMS, DEFAULT_ALIGNMENT = b"GGUF", (2, 3), 4, 32
LEAST_KEY_BYTES, LEAST_TENSOR_BYTES = 13, 32
"""What a key with its value, and a line of the table of tensors, take at least."""
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclasses.dataclass(frozen=True)
class GgufTensor(TensorEntry):
    """Where one tensor lies, and as what. The dtype is ggml's name of the type, which for plain values is that of safetensors.

    Attributes:
        type: of its blocks.
    """

    type: GgmlType

    @property
    def num_rows(self) -> int:
        """Rows of the last dim's values: N of a matrix, 1 of a vector."""
        return math.prod(self.shape[:-1])

    def blocks(self) -> TensorEntry:
        """Its bytes: U8 [rows, bytes of a row]."""
        return TensorEntry(self.name, self.path, "U8", (self.num_rows, self.num_bytes // self.num_rows), self.start, self.stop)


@dataclasses.dataclass(frozen=True)
class GgufHeader(Header):
    """One file's metadata and table of tensors. The digest is of all before the tensors' values.

    Attributes:
        metadata: key -> value; read-only.
    """

    metadata: Mapping[str, Value]


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A model's file, or all the files it was split into.

    Attributes:
        path: the file, the first one of several.
        headers: of each file, in order.
        metadata: of the first file; read-only.
        tensors: name -> tensor, of all files; read-only.
    """

    path: Path
    headers: tuple[GgufHeader, ...]
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A value of metadata, its type checked; ``default`` where it is missing.

        Raises:
            CheckpointError: another type.
        """
        value = self.metadata.get(key, default)
        if value is default:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise CheckpointError(f"{self.path}: {key} is {short(value)}; it must be {' or '.join(kind.__name__ for kind in kinds)}. "
                                  "Convert the model again")
        return value

    @property
    def arch(self) -> str:
        """``general.architecture``, such as ``"llama"``."""
        arch = self.get("general.architecture", str)
        if not arch:
            raise CheckpointError(f"{self.path}: general.architecture is missing; the file does not describe a model. Convert the model again")
        return arch


def open_gguf(path: Path | str) -> GgufFile:
    """Read and check the headers of a GGUF file, and of the others where the model is split; any one of them may be given.

    Raises:
        CheckpointError: not a GGUF file of version 2 or 3, big-endian, damaged, truncated, or a part missing; it names file, key or tensor.
    """
    path = Path(path)
    first = read_gguf_header(path)
    if _split_number(first, "split.count") < 2:
        return GgufFile(path, (first,), first.metadata, first.tensors)
    headers = [first if part == path else read_gguf_header(part) for part in _parts(first)]
    tensors: dict[str, GgufTensor] = {}
    for index, header in enumerate(headers):
        found = (_split_number(header, "split.no"), _split_number(header, "split.count"))
        if found != (index, len(headers)):
            raise CheckpointError(f"{header.path}: split.no and split.count are {found}; by its name they are {(index, len(headers))}. "
                                  "Name the file as it was, or download it again")
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{header.path}: tensor {short(name)} is in {tensors[name].path.name} too. Download both again")
            tensors[name] = tensor
    total = _split_number(headers[0], "split.tensors.count")
    if total != len(tensors):
        raise CheckpointError(f"{headers[0].path}: split.tensors.count is {total}; the {len(headers)} files hold {len(tensors)} tensors. "
                              "Download them again")
    return GgufFile(headers[0].path, tuple(headers), headers[0].metadata, MappingProxyType(tensors))


def read_gguf_header(path: Path) -> GgufHeader:
    """One file by itself; see :func:`open_gguf`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        cursor = Cursor(file, size)
        num_tensors, num_keys = _read_counts(cursor)
        metadata = _read_metadata(cursor, num_keys)
        alignment = _alignment(path, metadata)
        lines = _read_table(cursor, num_tensors)
        base = -(-cursor.position // alignment) * alignment
        tensors = [_tensor(path, *line, base=base, alignment=alignment, size=size) for line in lines]
        _check_overlap(path, tensors)
        digest = _digest(file, cursor.position)
    table = MappingProxyType({tensor.name: tensor for tensor in tensors})
    return GgufHeader(path=path, size=size, digest=digest, metadata=MappingProxyType(metadata), tensors=table)


def _read_counts(cursor: Cursor) -> tuple[int, int]:
    """(tensors, keys) behind the magic and the version."""
    path = cursor.path
    magic = cursor.take(4, "the magic number")
    if magic != MAGIC:
        raise CheckpointError(f"{path}: it starts with {magic!r}, not {MAGIC!r}: not a GGUF file, or damaged")
    version = cursor.u32("the version")
    if version not in VERSIONS:
        if version and version % 2**16 == 0:
            raise CheckpointError(f"{path}: a big-endian GGUF file, which is not read; convert it with llama.cpp's gguf_convert_endian.py")
        raise CheckpointError(f"{path}: version {version} of GGUF; versions 2 and 3 are read. Convert the model again with a current llama.cpp")
    num_tensors, num_keys = cursor.u64("the count of tensors"), cursor.u64("the count of keys")
    cursor.check_count(num_tensors, LEAST_TENSOR_BYTES, "the table of tensors")
    cursor.check_count(num_keys, LEAST_KEY_BYTES, "metadata")
    return num_tensors, num_keys


def _read_metadata(cursor: Cursor, num_keys: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for index in range(num_keys):
        key = cursor.text(f"key {index}", max_bytes=MAX_KEY_BYTES)
        what = f"key {short(key)}"
        if key in metadata:
            raise CheckpointError(f"{cursor.path}: {what} is there twice. {AGAIN}")
        metadata[key] = cursor.value(cursor.u32(f"the type of {what}"), what)
    return metadata


def _alignment(path: Path, metadata: Mapping[str, Value]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 2**31 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {short(alignment)}; it must be a power of two. {AGAIN}")
    return alignment


def _read_table(cursor: Cursor, num_tensors: int) -> list[tuple[str, tuple[int, ...], int, int]]:
    """(name, shape in numpy's order, type, offset) of each tensor."""
    lines, names = [], set()
    for index in range(num_tensors):
        name = cursor.text(f"the name of tensor {index}", max_bytes=MAX_KEY_BYTES)
        what = f"tensor {short(name)}"
        if name in names:
            raise CheckpointError(f"{cursor.path}: {what} is there twice. {AGAIN}")
        names.add(name)
        num_dims = cursor.u32(f"the number of dims of {what}")
        if not 1 <= num_dims <= MAX_DIMS:
            raise CheckpointError(f"{cursor.path}: {what} has {num_dims} dims; it must have 1 to {MAX_DIMS}. {AGAIN}")
        shape = tuple(cursor.u64(f"a dim of {what}") for _ in range(num_dims))[::-1]
        lines.append((name, shape, cursor.u32(f"the type of {what}"), cursor.u64(f"the offset of {what}")))
    return lines


def _tensor(path: Path, name: str, shape: tuple[int, ...], number: int, offset: int, *, base: int, alignment: int, size: int) -> GgufTensor:
    """One line of the table, its place checked against type, shape and the file."""
    where = f"{path}: tensor {short(name)}"
    if number not in GGML_TYPES:
        raise CheckpointError(f"{where} is of the ggml type {number}, which is not known; quantize the model to a type that is, such as Q4_K_M")
    kind, num_values = GGML_TYPES[number], math.prod(shape)
    if not all(0 < dim < 2**63 for dim in shape) or num_values >= 2**63:
        raise CheckpointError(f"{where} has shape {shape}; each dim must be at least 1, and their product below 2**63. {AGAIN}")
    if shape[-1] % kind.block:
        raise CheckpointError(f"{where}: rows of {shape[-1]} values are no multiple of {kind.name}'s blocks of {kind.block}. {AGAIN}")
    if offset % alignment:
        raise CheckpointError(f"{where}: its offset {offset} is no multiple of general.alignment {alignment}. {AGAIN}")
    start, stop = base + offset, base + offset + num_values // kind.block * kind.block_bytes
    if stop > size:
        raise CheckpointError(f"{path} is truncated: tensor {short(name)} ({kind.name}, shape {shape}) needs bytes {start} to {stop}, "
                              f"the file has {size}. {AGAIN}")
    return GgufTensor(name, path, kind.name, shape, start, stop, kind)


def _check_overlap(path: Path, tensors: list[GgufTensor]) -> None:
    position = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        if tensor.start < position:
            raise CheckpointError(f"{path}: tensor {short(tensor.name)} begins at byte {tensor.start}, within the tensor before it, which ends at "
                                  f"{position}. {AGAIN}")
        position = tensor.stop


def _digest(file: io.FileIO, size: int) -> str:
    digest = hashlib.sha256()
    for start in range(0, size, 2**20):
        digest.update(read_exactly(file, start=start, num_bytes=min(2**20, size - start)))
    return digest.hexdigest()


def _split_number(header: GgufHeader, key: str) -> int:
    value = header.metadata.get(key, 0)
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{header.path}: {key} is {short(value)}; it must be a whole number. {AGAIN}")
    return value


def _parts(header: GgufHeader) -> list[Path]:
    """All files that a model was split into, by the name of one of them."""
    count, match = _split_number(header, "split.count"), _SPLIT.fullmatch(header.path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(f"{header.path} is one of {count} files (split.count); they must keep their names, which end in "
                              f"-00001-of-{count:05d}.gguf, or be put together with llama.cpp's llama-gguf-split --merge")
    paths = [header.path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"{path} is missing: the model is split into {count} files. Download or copy it beside the others")
    return paths
