"""The rows of a JSONL file: one JSON object a line."""
from collections.abc import Iterator
from typing import BinaryIO

from tpllm.jobs.sources.line_rows import lines_of

BOM = b"\xef\xbb\xbf"


def jsonl_rows(content: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, each with its number from 1. A file made of several may have a byte order mark at any of them.

    Raises:
        JobError: a line that is too long.
    """
    for number, data in enumerate(lines_of(content, name), 1):
        row = data.strip()
        while row.startswith(BOM):
            row = row.removeprefix(BOM).lstrip()
        if row:
            yield number, row
