"""The safetensors format: eight bytes of header length, a JSON header, then the tensors back to back.

Nothing in the file is trusted: every length, offset and shape is checked before it is used, and the tensors must tile the rest of the file
exactly, as the format's own definition (https://github.com/huggingface/safetensors#format) demands.
"""
import dataclasses
import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tpllm.errors import CheckpointError, short

MAX_HEADER_BYTES = 100_000_000
MAX_DIMS, MAX_DEPTH = 64, 100
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "C64": 64, "U64": 64, "I64": 64,
        "F64": 64}
NUM_SAMPLES, SAMPLE_BYTES = 16, 4096
MAX_TENSOR_SAMPLES, WHOLE_BYTES, CHUNK_BYTES = 256, 64 << 20, 1 << 20
_AGAIN = "Download or copy it again"


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        name: as in the file.
        path: the file.
        dtype: the format's name of it, a key of :data:`BITS`.
        shape: in elements.
        start, stop: bytes from the beginning of the file.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Header:
    """One file's table of tensors.

    Attributes:
        path: the file.
        size: of the whole file, in bytes.
        digest: SHA-256 of the header.
        tensors: name -> entry.
    """

    path: Path
    size: int
    digest: str
    tensors: Mapping[str, TensorEntry]


def open_regular(path: Path) -> io.FileIO:
    """A regular file to read; anything else (a pipe, a device, a folder) is never opened.

    Raises:
        CheckpointError: it is not there, not regular or not readable.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path} is not a regular file; a checkpoint's files must be")
        # Without O_NONBLOCK a pipe put there in between would hang the open.
        return io.FileIO(path, opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def read_header(path: Path) -> Header:
    """The checked header of one file.

    Raises:
        CheckpointError: not a safetensors file, or a damaged or truncated one; it names the file, the tensor, and the bytes expected and found.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise CheckpointError(f"{path} has {size} bytes; a safetensors file has at least 8. {_AGAIN}")
        length = int.from_bytes(read_exactly(file, start=0, num_bytes=8), "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: a header of {length} bytes; the format's limit is {MAX_HEADER_BYTES}. "
                                  "It is not a safetensors file, or damaged")
        if length > size - 8:
            raise CheckpointError(f"{path} is truncated: its header needs {length} bytes, {size - 8} are there. {_AGAIN}")
        raw = read_exactly(file, start=8, num_bytes=length)
    entries = [_entry(path, name, value, 8 + length) for name, value in _parse(path, raw).items() if name != "__metadata__"]
    _check_tiling(path, entries, first=8 + length, size=size)
    return Header(path=path, size=size, digest=hashlib.sha256(raw).hexdigest(), tensors={entry.name: entry for entry in entries})


def read_exactly(file: io.FileIO, *, start: int, num_bytes: int) -> bytes:
    """Bytes of a file, all of them; several threads may read.

    Raises:
        CheckpointError: the file ends before, or the disk fails.
    """
    buffer = bytearray(num_bytes)
    read_into(file, memoryview(buffer), start=start)
    return bytes(buffer)


def read_into(file: io.FileIO, buffer: memoryview, *, start: int) -> None:
    """Fill a buffer of bytes from a file; see :func:`read_exactly`."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(file.fileno(), [buffer[done:]], start + done)
        except OSError as error:
            raise CheckpointError(f"{file.name} cannot be read at byte {start + done}: {error.strerror or error}") from None
        if count == 0:
            raise CheckpointError(f"{file.name} became shorter while it was read: bytes {start} to {start + len(buffer)} are needed, "
                                  f"it ends at {start + done}. {_AGAIN}")
        done += count


def sample_digest(header: Header) -> str:
    """SHA-256 of what :func:`digest_of_samples` reads of a file; ``header`` may be of another format."""
    return digest_of_samples(header.path, sorted((tensor.start, tensor.stop) for tensor in header.tensors.values()))


def digest_of_samples(path: Path, spans: Sequence[tuple[int, int]] = ()) -> str:
    """SHA-256 of a file of weights: of all of it up to 64 MiB; of a larger one of 16 evenly spaced blocks of 4 KiB, and of one in the middle of each
    tensor, of at most 256 of them. So it tells weights of one shape apart, also where some tensors only are others, without reading them all.

    Args:
        path: the file.
        spans: first byte and end of each of its tensors, as far as they are known.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        starts, num_bytes = list(range(0, size, CHUNK_BYTES)), CHUNK_BYTES
        if size > WHOLE_BYTES:
            starts = [(size - SAMPLE_BYTES) * index // (NUM_SAMPLES - 1) for index in range(NUM_SAMPLES)]
            starts += [(start + stop) // 2 for start, stop in spans[::max(1, -(-len(spans) // MAX_TENSOR_SAMPLES))]]
            num_bytes = SAMPLE_BYTES
        for start in starts:
            digest.update(read_exactly(file, start=start, num_bytes=min(num_bytes, size - start)))
    return digest.hexdigest()


def parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    """A JSON object without repeated keys, nested no more than :data:`MAX_DEPTH` deep.

    Raises:
        CheckpointError: anything else.
    """
    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise ValueError(f"{short(key)} is there twice")
            table[key] = value
        return table
    try:
        table = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}). {_AGAIN}") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: its JSON is a {type(table).__name__}; it must be an object. {_AGAIN}")
    if _is_deeper(table, MAX_DEPTH):
        raise CheckpointError(f"{path}: its JSON has lists and objects in each other, more than {MAX_DEPTH} deep, the limit. {_AGAIN}")
    return table


def _is_deeper(table: dict[str, Any], depth: int) -> bool:
    """Whether containers lie in each other more than ``depth`` deep: Python's own functions on values fail where they do."""
    level: list[Any] = [table]
    for _ in range(depth):
        level = [item for holder in level for item in (holder.values() if isinstance(holder, dict) else holder) if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    if raw[:1] != b"{":
        raise CheckpointError(f"{path}: its header starts with {raw[:1]!r}, not '{{': not a safetensors file, or damaged")
    table = parse_json(path, raw)
    metadata = table.get("__metadata__")
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise CheckpointError(f"{path}: __metadata__ must map names to text")
    return table


def _entry(path: Path, name: str, value: Any, base: int) -> TensorEntry:
    """One line of the table, its size checked against shape and dtype."""
    where = f"{path}: tensor {short(name)}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise CheckpointError(f"{where}: needs dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{where}: unknown dtype {short(dtype)}; known: {', '.join(BITS)}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMS:
        raise CheckpointError(f"{where}: shape {short(shape)} is not a list of at most {MAX_DIMS} whole numbers")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {short(offsets)} are not [begin, end] with begin <= end")
    expected_bits, actual = math.prod(shape) * BITS[dtype], offsets[1] - offsets[0]
    if expected_bits != actual * 8:
        raise CheckpointError(f"{where}: {dtype} of shape {short(shape)} takes {short(-(-expected_bits // 8))} bytes, "
                              f"its data_offsets {offsets} hold {actual}")
    return TensorEntry(name, path, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _is_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_tiling(path: Path, entries: list[TensorEntry], *, first: int, size: int) -> None:
    """The tensors must follow one another without a gap, from the header to the end of the file."""
    position = first
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {short(entry.name)} {what}: it must begin at byte {position}, it begins at {entry.start}")
        if entry.stop > size:
            raise CheckpointError(f"{path} is truncated: tensor {short(entry.name)} needs {entry.num_bytes} bytes up to byte {entry.stop}, "
                                  f"{max(size - entry.start, 0)} are there (the file has {size}). {_AGAIN}")
        position = entry.stop
    if position != size:
        raise CheckpointError(f"{path}: its tensors end at byte {position}, the file has {size}. {_AGAIN}")
