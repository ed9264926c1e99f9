"""The rows of a text file, JSONL or CSV: read from its beginning, each with the number of its line."""
from collections.abc import Callable, Generator, Iterator
from typing import BinaryIO

from tpllm.errors import JobError
from tpllm.jobs.sources.files import InputFile
from tpllm.jobs.sources.raw_row import FileSummary, RawRow

MAX_LINE_BYTES = 1 << 28


class LineRows:
    """A text file of rows.

    Args:
        file: where it is.
        parse: the content and the name that errors give it -> each row's first line, from 1, and its JSON object.
    """

    def __init__(self, file: InputFile, parse: Callable[[BinaryIO, str], Iterator[tuple[int, bytes]]]):
        self.file, self._parse = file, parse

    def scan(self, first: int, note: Callable[[RawRow], None]) -> FileSummary:
        """Read everything once.

        Args:
            first: the number of the file's first row.
            note: called with every row.
        """
        num_rows = 0
        with self.file.scanned() as (content, digest):
            for line, data in self._parse(content, self.file.name):
                note(RawRow(first + num_rows, data, self.file.name, line))
                num_rows += 1
        return FileSummary(digest.hexdigest(), digest.num_bytes, num_rows)

    def rows(self, first: int, is_wanted: Callable[[int], bool], stop: float) -> Generator[RawRow, None, int]:
        """The wanted rows in order, lazily.

        Args:
            first: the number of the file's first row.
            is_wanted: of a row's number.
            stop: the number of the first row that is not read any more.

        Returns:
            The number of the next file's first row.
        """
        index = first
        with self.file.opened() as content:
            for line, data in self._parse(content, self.file.name):
                if index >= stop:
                    break
                if is_wanted(index):
                    yield RawRow(index, data, self.file.name, line)
                index += 1
        return index


def lines_of(content: BinaryIO, name: str) -> Iterator[bytes]:
    """The lines of a file with their ends, none of them longer than ``MAX_LINE_BYTES``.

    Raises:
        JobError: a longer one, with its number.
    """
    for number, data in enumerate(iter(lambda: content.readline(MAX_LINE_BYTES + 1), b""), 1):
        if len(data) > MAX_LINE_BYTES:
            raise JobError(f"cannot read the input {name}: line {number} is longer than {MAX_LINE_BYTES >> 20} MiB; write one row a line")
        yield data
