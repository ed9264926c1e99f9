"""The rows of a JSONL file."""
from collections.abc import Callable, Generator, Iterator
from typing import BinaryIO

from tpllm.errors import JobError
from tpllm.jobs.sources.files import InputFile
from tpllm.jobs.sources.raw_row import FileSummary, RawRow

BOM = b"\xef\xbb\xbf"
MAX_LINE_BYTES = 1 << 28


class JsonlRows:
    """A file of one JSON object a line."""

    def __init__(self, file: InputFile):
        self.file = file

    def scan(self, first: int, note: Callable[[RawRow], None]) -> FileSummary:
        """Read everything once.

        Args:
            first: the number of the file's first row.
            note: called with every row.
        """
        num_rows = 0
        with self.file.scanned() as (lines, digest):
            for line, data in _contents(lines, self.file.name):
                note(RawRow(first + num_rows, data, self.file.name, line))
                num_rows += 1
        return FileSummary(digest.hexdigest(), digest.num_bytes, num_rows)

    def rows(self, first: int, is_wanted: Callable[[int], bool]) -> Generator[RawRow, None, int]:
        """The wanted rows in order, lazily.

        Args:
            first: the number of the file's first row.
            is_wanted: of a row's number.

        Returns:
            The number of the next file's first row.
        """
        index = first
        with self.file.opened() as lines:
            for line, data in _contents(lines, self.file.name):
                if is_wanted(index):
                    yield RawRow(index, data, self.file.name, line)
                index += 1
        return index


def _contents(lines: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, each with its number from 1. A file made of several may have a byte order mark at any of them."""
    for number, data in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES + 1), b""), 1):
        if len(data) > MAX_LINE_BYTES:
            raise JobError(f"cannot read the input {name}: line {number} is longer than {MAX_LINE_BYTES >> 20} MiB; write one JSON object a line")
        content = data.strip()
        while content.startswith(BOM):
            content = content.removeprefix(BOM).lstrip()
        if content:
            yield number, content
