"""The rows of a job's input, whatever files they lie in: scanned once, then read as often as needed."""
import array
import bisect
import hashlib
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Protocol

import numpy as np

from tpllm.errors import JobError
from tpllm.jobs.sources.column_types import ColumnTypes
from tpllm.jobs.sources.files import InputFile
from tpllm.jobs.sources.raw_row import FileSummary, InputSummary, RawRow, custom_id_of, custom_id_text


class FileRows(Protocol):
    """The rows of one file, ``file``."""

    file: InputFile

    def scan(self, first: int, note: Callable[[RawRow], None]) -> FileSummary:
        """Read everything once, and call ``note`` with every row (of a Parquet row its custom_id is enough)."""

    def rows(self, first: int, is_wanted: Callable[[int], bool], stop: float) -> Generator[RawRow, None, int]:
        """The wanted rows below ``stop`` in order, lazily; returns the number of the next file's first row."""


class RowSource:
    """The rows of all files in order, numbered through from 0.

    Args:
        kind: of all files.
        files: what each file holds.
        limit: the most rows to give, from the first; None for all.

    Attributes:
        columns: the names of a table's columns; None where each row has keys of its own.
    """

    columns: Sequence[str] | None = None

    def __init__(self, kind: str, files: Sequence[FileRows], *, limit: int | None = None):
        self.kind, self.files = kind, files
        self._limit = math.inf if limit is None else limit
        self._firsts: list[int] = []

    def scan(self, *, infer_columns: bool = False) -> InputSummary:
        """Hash the files, also behind the limit, count their rows and check their custom ids, in memory of 8 bytes a row.

        Args:
            infer_columns: also find the types of a JSONL input's columns.

        Raises:
            JobError: a custom_id that two rows have, with both rows; a file that cannot be read; columns that cannot be a table's.
        """
        digests, columns = array.array("Q"), ColumnTypes() if infer_columns else None

        def note(row: RawRow) -> None:
            if row.index >= self._limit:
                return
            digests.append(_digest(custom_id_text(custom_id_of(row.data, row.index))))
            if columns is not None:
                columns.add(row)
        summaries: list[FileSummary] = []
        for file in self.files:
            summaries.append(file.scan(sum(summary.num_rows for summary in summaries), note))
        self._firsts = list(itertools.accumulate((summary.num_rows for summary in summaries), initial=0))
        self._refuse_twins(digests)
        return InputSummary(len(digests), tuple(summaries), columns.result() if columns else None)

    def rows(self, is_wanted: Callable[[int], bool] = lambda index: True) -> Iterator[RawRow]:
        """The wanted rows in order, lazily.

        Raises:
            JobError: a file is not the one that was scanned.
        """
        first = 0
        for file in self.files:
            first = yield from file.rows(first, is_wanted, self._limit)
            file.file.check_unchanged()

    def check_unchanged(self, rows: range) -> None:
        """Make sure that the files in which some rows lie are still those that were scanned, as far as their sizes and times tell; that the rows
        which were read are the scanned ones is made sure of as they are read.

        Raises:
            JobError: one of them is not.
        """
        for file in self.files[bisect.bisect_right(self._firsts, rows.start) - 1:bisect.bisect_left(self._firsts, rows.stop)] if rows else ():
            file.file.check_unchanged()

    def _refuse_twins(self, digests: array.array) -> None:
        """Equal digests are looked up in the files again, so that a chance collision refuses nothing."""
        ordered = np.sort(np.frombuffer(digests, np.uint64))
        suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        first_rows: dict[str, RawRow] = {}
        for row in self.rows(lambda index: digests[index] in suspects) if suspects else ():
            custom_id = custom_id_of(row.data, row.index)
            if (twin := first_rows.setdefault(custom_id_text(custom_id), row)) is not row:
                raise JobError(f"custom_id {custom_id!r} is on {twin} and on {row}; each must be unique (a row without one has its row number, "
                               "from 0, as its custom_id)")


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())
