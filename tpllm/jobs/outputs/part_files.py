"""The files of a part: their names, how they are written, and how many rows one holds. Part ``p`` is the input's rows
``p * rows_per_part`` up to the next part's first.

Whoever reads an output folder (status, merge) needs only :func:`part_files` and :func:`num_rows_of`, whatever the format.
"""
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Protocol

from tpllm.errors import JobError
from tpllm.jobs.outputs.durable import CHUNK_BYTES
from tpllm.jobs.outputs.journal import FinishedRow
from tpllm.jobs.sources.open import need_pyarrow

PART_NAME = re.compile(r"part-(\d{5,})\.(?:jsonl|parquet)")
ERRORS_NAME = re.compile(r"part-(\d{5,})\.errors\.jsonl")
TEMPORARY_NAME = re.compile(r"(manifest\.json|journal-\d{5,}\.jsonl|part-\d{5,}(\.errors\.jsonl|\.jsonl|\.parquet))\.tmp")


@dataclasses.dataclass(frozen=True)
class PartFiles:
    """The files of one committed part.

    Attributes:
        part: its number.
        rows: the file of its finished rows; it is there if and only if the part is committed.
        errors: the file of its rows that could not be run, or None where there are none.
    """

    part: int
    rows: pathlib.Path
    errors: pathlib.Path | None

    @property
    def paths(self) -> tuple[pathlib.Path, ...]:
        """Those that are there; the errors come first, as they are written."""
        return (self.rows,) if self.errors is None else (self.errors, self.rows)


class PartFormat(Protocol):
    """How the finished rows of a part become a file."""

    def name(self, part: int) -> str:
        """The file's name."""

    def chunks(self, rows: Iterable[FinishedRow]) -> Iterator[bytes]:
        """The file's content, piece by piece, in memory that does not grow with the number of rows; the same rows give the same bytes."""

    def lines(self, path: pathlib.Path) -> Iterator[bytes]:
        """The lines that finished rows had of which :meth:`chunks` made a file: those from which it makes the same rows again."""


class _Jsonl:
    """One JSON object a line."""

    def name(self, part: int) -> str:
        return f"part-{part:05d}.jsonl"

    def chunks(self, rows: Iterable[FinishedRow]) -> Iterator[bytes]:
        return (row.line + b"\n" for row in rows)

    def lines(self, path: pathlib.Path) -> Iterator[bytes]:
        with path.open("rb") as file:
            yield from (line.removesuffix(b"\n") for line in file)


JSONL = _Jsonl()


def errors_name(part: int) -> str:
    """The name of a part's errors file, which is JSONL in every format."""
    return f"part-{part:05d}.errors.jsonl"


def part_files(folder: pathlib.Path) -> dict[int, PartFiles]:
    """The committed parts of an output folder, in order of their numbers.

    Raises:
        JobError: a part that is there in two formats.
    """
    paths = list(folder.iterdir())
    errors = {int(match[1]): path for path in paths if (match := ERRORS_NAME.fullmatch(path.name))}
    found: dict[int, PartFiles] = {}
    for path in sorted(paths):
        if match := PART_NAME.fullmatch(path.name):
            part = int(match[1])
            if part in found:
                raise JobError(f"part {part} is there twice, as {found[part].rows} and as {path}; remove the one that is not the job's")
            found[part] = PartFiles(part, path, errors.get(part))
    return dict(sorted(found.items()))


def is_readable(path: pathlib.Path) -> bool:
    """Whether every row of a part's file or errors file can be parsed; all of it is read."""
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet
            with parquet.ParquetFile(path) as file:
                return all(batch.validate(full=True) is None for batch in file.iter_batches())
        with path.open("rb") as lines:
            return all(isinstance(json.loads(line), dict) for line in lines)
    except (OSError, ValueError, RecursionError):  # Arrow's own errors are of the first two kinds
        return False


def num_rows_of(path: pathlib.Path) -> int:
    """The rows of a part's file or errors file, without reading more of it than need be.

    Raises:
        JobError: a file that cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            need_pyarrow(str(path))
            from pyarrow import parquet
            return parquet.read_metadata(path).num_rows
        with path.open("rb") as file:
            num_rows, last = 0, b"\n"
            while piece := file.read(CHUNK_BYTES):
                num_rows, last = num_rows + piece.count(b"\n"), piece[-1:]
            return num_rows + (last != b"\n")
    except JobError:
        raise
    except (OSError, ValueError) as error:  # Arrow's own errors are of either kind
        raise JobError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
