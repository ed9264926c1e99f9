"""How the rows of an input make parts, and which parts one process runs, so that several machines can share a job.

A shard is made of whole parts, those whose number is its index modulo the number of shards. Rows keep their numbers, and with them their seeds,
ids and parts, so the shards' files are those of the unsharded job.
"""
import dataclasses
import re
from collections.abc import Container, Mapping

from tpllm.errors import JobError

MAX_SHARDS = 100_000
SHARD_TEXT = re.compile(r"(\d{1,9})/(\d{1,9})")
SHARD_NAME = re.compile(r"shard-(\d{5,})-of-(\d{5,})")


@dataclasses.dataclass(frozen=True, order=True)
class Shard:
    """One of ``count`` shards; ``index`` counts from 0. Its text is ``index/count``."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def folder_name(self) -> str:
        """The name of its folder below the job's output."""
        return f"shard-{self.index:05d}-of-{self.count:05d}"


WHOLE = Shard(0, 1)
"""All parts: an unsharded job."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a job, or of a shard of it: part ``p`` is the rows from ``p * rows_per_part`` up to the next part's first. An input without
    rows makes one empty part.

    Attributes:
        num_input_rows: of the input.
        rows_per_part: of every part but the last.
        shard: whose parts.
    """

    num_input_rows: int
    rows_per_part: int
    shard: Shard = WHOLE

    @property
    def numbers(self) -> range:
        """The numbers of the shard's parts."""
        return range(self.shard.index, self.num_input_parts, self.shard.count)

    @property
    def num_input_parts(self) -> int:
        """How many parts the whole input makes."""
        return max(1, -(-self.num_input_rows // self.rows_per_part))

    @property
    def num_rows(self) -> int:
        """The rows of the shard's parts."""
        numbers = self.numbers
        return (len(numbers) - 1) * self.rows_per_part + self.size(numbers[-1]) if numbers else 0

    @property
    def is_empty(self) -> bool:
        """Whether the input has no rows, and the shard its one part."""
        return self.num_input_rows == 0 and 0 in self.numbers

    def part_of(self, index: int) -> int:
        """The part of a row."""
        return index // self.rows_per_part

    def lack(self, index: int, committed: Container[int], known: Mapping[int, Container[int]]) -> bool:
        """Whether a row is one of the shard's that is not finished: neither in a committed part nor among the known rows of its part."""
        part = self.part_of(index)
        return part in self.numbers and part not in committed and index not in known.get(part, ())

    def rows(self, part: int) -> range:
        """The rows of a part."""
        return range(part * self.rows_per_part, min((part + 1) * self.rows_per_part, self.num_input_rows))

    def size(self, part: int) -> int:
        """How many rows a part has."""
        return len(self.rows(part))


def parse_shard(text: object) -> Shard:
    """The shard of a text such as ``0/4``.

    Raises:
        JobError: another form, no shards or too many, or an index that is not below their number.
    """
    match = SHARD_TEXT.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise JobError(f"shard is {text!r}; it must be i/n with i from 0 to n - 1, as in 0/4 for the first of four")
    shard = Shard(int(match[1]), int(match[2]))
    if not 1 <= shard.count <= MAX_SHARDS:
        raise JobError(f"shard is {text!r}; the number of shards, {shard.count}, must be from 1 to {MAX_SHARDS}")
    if shard.index >= shard.count:
        last = "0" if shard.count == 1 else f"from 0 to {shard.count - 1}"
        raise JobError(f"shard is {text!r}; the first number must be {last}: shards count from 0")
    return shard
