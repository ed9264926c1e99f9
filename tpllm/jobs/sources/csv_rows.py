"""The rows of CSV files, each as a JSON object of text: a header names the columns, a quoted field may hold line breaks.

Cells of the columns in ``JSON_COLUMNS`` are JSON; an empty one of these, or of ``custom_id``, is a key that is not given.
"""
import csv
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from tpllm.errors import JobError
from tpllm.jobs.json_line import REQUEST_KEYS, parsed_or_text, to_line
from tpllm.jobs.sources.files import CSV, InputFile
from tpllm.jobs.sources.line_rows import MAX_LINE_BYTES, LineRows, lines_of
from tpllm.jobs.sources.row_source import RowSource

JSON_COLUMNS = (*REQUEST_KEYS, "prompt_token_ids", "parse_special")
QUOTING = "quote a field that holds commas, quotes or line breaks, and write a quote inside it twice"


class CsvSource(RowSource):
    """CSV files of the same columns."""

    def __init__(self, files: Sequence[InputFile], *, limit: int | None = None):
        super().__init__(CSV, [LineRows(file, csv_rows) for file in files], limit=limit)
        headers = [_header(file) for file in files]
        for file, header in zip(files, headers, strict=True):
            if sorted(header) != sorted(headers[0]):
                raise JobError(f"the input files have different columns: {file.name} has {', '.join(map(repr, header))}, and {files[0].name} has "
                               f"{', '.join(map(repr, headers[0]))}; make their columns the same, or make each kind its own job")
        self.columns = headers[0]


def csv_rows(content: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """The rows behind the header, each with the number of its first line, from 1; blank lines are left out.

    Raises:
        JobError: no header, a row of another number of fields, quotes that are not closed, or bytes that are not UTF-8, with the line.
    """
    records = _records(content, name)
    _, columns = next(records, (0, []))
    if not columns:
        raise JobError(f"cannot read the input {name}: it has no header; name the columns in its first line")
    if twins := [column for column in columns if columns.count(column) > 1]:
        raise JobError(f"cannot read the input {name}: it has several columns called {twins[0]!r}; rename them")
    for line, cells in records:
        if len(cells) != len(columns):
            raise JobError(f"cannot read the input {name}: line {line} has {len(cells)} fields and the header has {len(columns)}; {QUOTING}")
        yield line, to_line({column: _value(column, cell) for column, cell in zip(columns, cells, strict=True)})


def _header(file: InputFile) -> list[str]:
    with file.opened() as content:
        return next(_records(content, file.name), (0, []))[1]


def _records(content: BinaryIO, name: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(MAX_LINE_BYTES)  # Python's own limit is 128 KiB, less than a long prompt
    reader = csv.reader(_texts(content, name), strict=True)
    first = 1
    try:
        for cells in reader:
            if cells:
                yield first, cells
            first = reader.line_num + 1
    except csv.Error as error:
        raise JobError(f"cannot read the input {name}: the row that begins on line {first} is not CSV: {error}; {QUOTING}") from None


def _texts(content: BinaryIO, name: str) -> Iterator[str]:
    for number, data in enumerate(lines_of(content, name), 1):
        try:
            yield data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise JobError(f"cannot read the input {name}: line {number} is not UTF-8: {error.reason} at byte {error.start}; save the file as "
                           "UTF-8") from None


def _value(column: str, cell: str) -> object:
    if not cell and column in (*JSON_COLUMNS, "custom_id"):
        return None
    return parsed_or_text(cell) if column in JSON_COLUMNS else cell
