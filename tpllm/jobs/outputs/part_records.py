"""What each committed file of a part is: its rows, its bytes and their hash, so that one that was cut or replaced does not pass for finished.

In the end the manifest tells of all files under ``parts``. Until then ``commits.jsonl`` does, a line for each part, ``crc32 JSON``, written before
the part gets its name: so every part that is there was told of. A part's last line counts; one that is torn tells of a part that is not there.
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tpllm.errors import JobError
from tpllm.jobs.outputs.durable import CHUNK_BYTES, Disk
from tpllm.jobs.outputs.part_files import ERRORS_NAME, PART_NAME, PartFiles, is_readable, num_rows_of

COMMITS = "commits.jsonl"
PARTS = "parts"
LINE = re.compile(rb"([0-9a-f]{8}) (.*)\n")


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """What a committed file is: the SHA-256 of its bytes, and how many bytes and rows there are."""

    sha256: str
    num_bytes: int
    num_rows: int


PartRecord = Mapping[str, FileRecord]
"""What is known of each of a part's files, by its name."""


class Tally:
    """Learns what a file is while its content passes by."""

    def __init__(self):
        self._sha256, self._num_bytes = hashlib.sha256(), 0

    def over(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """The chunks, noted."""
        for chunk in chunks:
            self._sha256.update(chunk)
            self._num_bytes += len(chunk)
            yield chunk

    def record(self, num_rows: int) -> FileRecord:
        """What it was."""
        return FileRecord(self._sha256.hexdigest(), self._num_bytes, num_rows)


class CommitLog:
    """``commits.jsonl`` of a folder, to be written to.

    Args:
        folder: the job's output.
        disk: how to write.
    """

    def __init__(self, folder: pathlib.Path, disk: Disk):
        self._path, self._disk = folder / COMMITS, disk

    def append(self, part: int, record: PartRecord) -> None:
        """Tell of a part; the line is on the device when this returns."""
        body = json.dumps({"part": part, "files": _as_json(record)}).encode()
        fd = self._disk.create(self._path)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":  # what a process that died there left would take this line with it
                self._disk.append(fd, b"\n")
            self._disk.append(fd, b"%08x %s\n" % (zlib.crc32(body), body))
            self._disk.sync(fd)
        finally:
            os.close(fd)
        if not size:
            self._disk.sync_folder(self._path.parent)

    def remove(self) -> None:
        """Once the manifest tells of all parts."""
        if self._path.exists():
            self._disk.remove(self._path)
            self._disk.sync_folder(self._path.parent)


def read_records(folder: pathlib.Path, manifest: Mapping[str, Any] | None) -> dict[int, PartRecord]:
    """What is recorded of each part of a folder.

    Args:
        folder: a job's output.
        manifest: its manifest, or None to read what the log alone tells.

    Raises:
        JobError: a damaged record in the manifest, or a log that cannot be read.
    """
    return {**records_of(manifest or {}), **dict(_read_log(folder))}


def records_of(manifest: Mapping[str, Any]) -> dict[int, PartRecord]:
    """What a manifest tells of each part.

    Raises:
        JobError: a record that is damaged.
    """
    parts: dict[int, dict[str, FileRecord]] = {}
    try:
        for name, record in manifest.get(PARTS, {}).items():
            match = PART_NAME.fullmatch(name) or ERRORS_NAME.fullmatch(name)
            parts.setdefault(int(match[1]), {})[name] = _file_record(record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise JobError(f"the manifest is damaged: under {PARTS!r} it holds what is no record of a file ({type(error).__name__}: {error}); "
                       "restore it, or give this job another output") from None
    return parts


def as_section(records: Mapping[int, PartRecord]) -> dict[str, dict[str, Any]]:
    """The manifest's ``parts``: of each file, by its name, in the order of the parts."""
    return {name: record for part in sorted(records) for name, record in _as_json(records[part]).items()}


def record_of(files: PartFiles) -> dict[str, FileRecord]:
    """What the files of a part are now.

    Raises:
        JobError: one that cannot be read.
    """
    record = {}
    for path in files.paths:
        tally = Tally()
        with path.open("rb") as file:
            for _ in tally.over(iter(lambda file=file: file.read(CHUNK_BYTES), b"")):
                pass
        record[path.name] = tally.record(num_rows_of(path))
    return record


def damage_of(files: PartFiles, record: PartRecord | None, num_rows: int, *, hashes: bool = False) -> str | None:
    """In what the files of a part differ from what is recorded, as the first half of a sentence; None where they do not.

    Args:
        files: the part's.
        record: what is recorded; None where nothing is (a folder that was copied without its log): then rows are counted and parsed.
        num_rows: of the part.
        hashes: whether the content is compared too, not only rows and bytes.
    """
    shown = " and ".join(map(str, files.paths))
    try:
        found_rows, found_bytes = sum(map(num_rows_of, files.paths)), sum(path.stat().st_size for path in files.paths)
        is_whole = all(map(_ends_whole, files.paths))
    except (JobError, OSError) as error:
        return f"{shown} should hold {num_rows} whole rows and cannot be read: {error}"
    if record is None:
        if found_rows == num_rows and is_whole and all(map(is_readable, files.paths)):
            return None
        return f"{shown} should hold {num_rows} whole rows and hold {found_rows}, of which one may be torn or damaged"
    wanted_bytes = sum(file.num_bytes for file in record.values())
    by_file = {path.name: (num_rows_of(path), path.stat().st_size) for path in files.paths}
    if by_file != {name: (file.num_rows, file.num_bytes) for name, file in record.items()} or found_rows != num_rows or not is_whole:
        missing = [name for name in record if name not in by_file]
        return (f"{shown} should hold {num_rows} whole rows in {wanted_bytes} bytes and hold {found_rows} in {found_bytes}"
                + (f", for {missing[0]} is missing" if missing else ""))
    if hashes and (other := [name for name, file in record_of(files).items() if file.sha256 != record[name].sha256]):
        return (f"{shown} should hold {num_rows} whole rows in {wanted_bytes} bytes, which are others than those that were committed: the SHA-256 of "
                f"{other[0]} is not {record[other[0]].sha256[:12]}...")
    return None


def _as_json(record: PartRecord) -> dict[str, dict[str, Any]]:
    return {name: dataclasses.asdict(record[name]) for name in sorted(record)}


def _file_record(fields: Mapping[str, Any]) -> FileRecord:
    record = FileRecord(**fields)
    if not isinstance(record.sha256, str) or type(record.num_bytes) is not int or type(record.num_rows) is not int:
        raise TypeError(f"{fields!r:.100}")
    return record


def _read_log(folder: pathlib.Path) -> Iterator[tuple[int, PartRecord]]:
    try:
        lines = (folder / COMMITS).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise JobError(f"cannot read {folder / COMMITS}: {error.strerror}") from None
    for line in lines:
        match = LINE.fullmatch(line)
        if match and int(match[1], 16) == zlib.crc32(match[2]):
            with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError, RecursionError):  # not ours, whatever it is
                entry = json.loads(match[2])
                yield int(entry["part"]), {name: _file_record(record) for name, record in entry["files"].items()}


def _ends_whole(path: pathlib.Path) -> bool:
    if path.suffix != ".jsonl":
        return True
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - 1, 0))
        return size == 0 or file.read(1) == b"\n"
