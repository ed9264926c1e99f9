"""Where a job's rows come from: a JSONL file, read lazily and twice (once to know it, once to run it)."""
import array
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from tpllm.errors import JobError

BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class RawRow:
    """One row as it stands in the input.

    Attributes:
        index: its number among the input's rows, from 0; blank lines are not rows.
        line: its line in the file, from 1.
        data: the bytes of the line.
    """

    index: int
    line: int
    data: bytes


@dataclasses.dataclass(frozen=True)
class InputSummary:
    """What the first pass learns: the hash of the bytes, and how many bytes and rows there are."""

    sha256: str
    num_bytes: int
    num_rows: int


class RowSource(Protocol):
    """An input of any kind: scanned once, then iterated as often as needed."""

    def scan(self) -> InputSummary:
        """Read everything once; refuse two rows of one custom_id."""

    def rows(self) -> Iterator[RawRow]:
        """All rows in order, lazily."""


def open_source(path: str) -> RowSource:
    """The source for an ``input`` of a job file.

    Raises:
        JobError: a kind of input that is not supported, or a file that cannot be read.
    """
    if "://" in path or any(mark in path for mark in "*?["):
        raise JobError(f"input is {path!r}; it must be one local JSONL file: remote paths and globs are not supported yet")
    if path.endswith((".parquet", ".gz", ".zst", ".csv")):
        raise JobError(f"input is {path!r}; only JSONL is supported yet: write one JSON object a line")
    return JsonlSource(pathlib.Path(path))


class JsonlSource:
    """A file of one JSON object a line."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            with path.open("rb"):
                pass
        except OSError as error:
            raise JobError(f"cannot read the input {path}: {error.strerror} (paths are relative to the working directory, "
                           f"here {pathlib.Path.cwd()})") from None
        self._stamp = self._stat()

    def scan(self) -> InputSummary:
        """Hash the file, count its rows and check its custom ids, in memory of 8 bytes a row.

        Raises:
            JobError: a custom_id that two rows have, with both rows.
        """
        sha256, num_bytes, num_rows = hashlib.sha256(), 0, 0
        digests = array.array("Q")
        with self.path.open("rb") as lines:
            for number, data in enumerate(lines, 1):
                sha256.update(data)
                num_bytes += len(data)
                if content := _content(data, number):
                    digests.append(_digest(custom_id_of(content, num_rows)))
                    num_rows += 1
        self._refuse_twins(digests)
        return InputSummary(sha256.hexdigest(), num_bytes, num_rows)

    def rows(self) -> Iterator[RawRow]:
        """All rows in order.

        Raises:
            JobError: the file is not the one that was scanned.
        """
        index = 0
        with self.path.open("rb") as lines:
            for number, data in enumerate(lines, 1):
                if content := _content(data, number):
                    yield RawRow(index, number, content)
                    index += 1
        if self._stat() != self._stamp:
            raise JobError(f"the input {self.path} changed while the job ran; what is written belongs to the old content: "
                           "restore it to go on, or give the new content another output")

    def _refuse_twins(self, digests: array.array) -> None:
        """Equal digests are looked up in the file again, so that a chance collision refuses nothing."""
        ordered = np.sort(np.frombuffer(digests, np.uint64))
        suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        first_rows: dict[str, RawRow] = {}
        for row in self.rows() if suspects else ():
            custom_id = custom_id_of(row.data, row.index)
            if digests[row.index] not in suspects:
                continue
            if (twin := first_rows.setdefault(custom_id, row)) is not row:
                raise JobError(f"{self.path}: custom_id {custom_id!r} is on row {twin.index} (line {twin.line}) and on row {row.index} "
                               f"(line {row.line}); each must be unique (a row without one has its row number, from 0, as its custom_id)")

    def _stat(self) -> tuple[int, int, int]:
        stat = os.stat(self.path)
        return stat.st_ino, stat.st_size, stat.st_mtime_ns


def custom_id_of(data: bytes, index: int) -> str:
    """The custom_id a row has in the output; a row without a readable one has its row number."""
    if b"custom_id" in data or b"\\u" in data:
        try:
            custom_id = json.loads(data).get("custom_id")
        except (ValueError, AttributeError, RecursionError):
            custom_id = None
        if isinstance(custom_id, str):
            return custom_id
    return str(index)


def _content(data: bytes, line: int) -> bytes:
    return (data.removeprefix(BOM) if line == 1 else data).strip()


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())
