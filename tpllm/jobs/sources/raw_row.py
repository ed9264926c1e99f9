"""One row of the input before it is looked into, and what the first pass over the input learns."""
import dataclasses
import json
import math
from collections.abc import Mapping

from tpllm.engine.whole_numbers import whole


@dataclasses.dataclass(frozen=True)
class RawRow:
    """One row as it stands in the input.

    Attributes:
        index: its number among the rows of all files, from 0; blank lines are not rows.
        data: one JSON object: the bytes of a line, or those that stand for a row of a Parquet file.
        file: the file, as errors name it.
        line: its line in the file, from 1; None in a Parquet file.
        file_row: its row in a Parquet file, from 0; None elsewhere.
    """

    index: int
    data: bytes
    file: str
    line: int | None = None
    file_row: int | None = None

    @property
    def place(self) -> dict[str, str | int]:
        """Where it is: ``file``, and ``line`` or ``file_row``."""
        return {"file": self.file, "line": self.line} if self.line is not None else {"file": self.file, "file_row": self.file_row}

    def __str__(self) -> str:
        return f"row {self.index} ({self.file} {f'line {self.line}' if self.line is not None else f'row {self.file_row}'})"


@dataclasses.dataclass(frozen=True)
class FileSummary:
    """What the first pass learns of one file: the SHA-256 of its bytes as they are stored, and how many bytes and rows there are."""

    sha256: str
    num_bytes: int
    num_rows: int


@dataclasses.dataclass(frozen=True)
class InputSummary:
    """What the first pass learns.

    Attributes:
        num_rows: of all files.
        files: of each file, in order.
        columns: name -> type of every column of a JSONL input, where it was asked for
            (:class:`tpllm.jobs.sources.column_types.ColumnTypes`).
    """

    num_rows: int
    files: tuple[FileSummary, ...]
    columns: Mapping[str, str] | None = None


def is_custom_id(value: object) -> bool:
    """Whether a value may be a custom_id: a text or a number, which keeps its value."""
    return isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))


def custom_id_of(data: bytes, index: int) -> str | int | float:
    """The custom_id a row has in the output; a row without a readable one has its row number, as text."""
    if b"custom_id" in data or b"\\u" in data:
        try:
            custom_id = json.loads(data).get("custom_id")
        except (ValueError, AttributeError, RecursionError):
            custom_id = None
        if is_custom_id(custom_id):
            return custom_id
    return str(index)


def custom_id_text(custom_id: str | int | float) -> str:
    """A custom_id as text: what OpenAI's output rows have, where it is always text, and by what two are told apart, so that 7, 7.0 and "7" are one
    and nobody who reads them as text finds a row twice."""
    return custom_id if isinstance(custom_id, str) else str(whole(custom_id))
