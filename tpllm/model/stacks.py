"""Matrices of one shape, one for each expert, as the rows of one parameter: how the rows of a mesh's shards lie in it."""
import dataclasses
from collections.abc import Iterator

ROW_MULTIPLE = 32
"""Matrices begin at multiples of it, since the native kernels read outputs in blocks of as many."""


@dataclasses.dataclass(frozen=True)
class Stack:
    """The rows of a stacked parameter: of each group of experts, of each cut of their rows, matrix after matrix.

    A shard of the parameter's rows is one group's cut, so each device finds its experts' rows one after the other.

    Attributes:
        num: matrices.
        rows: of each, without padding.
        groups: into how many parts the experts axis cuts the matrices.
        cuts: into how many parts a mesh axis cuts the rows of each.
    """

    num: int
    rows: int
    groups: int = 1
    cuts: int = 1

    @property
    def shard_matrices(self) -> int:
        """Matrices of a shard."""
        return self.num // self.groups

    @property
    def shard_rows(self) -> int:
        """Rows of each of them, without padding."""
        return self.rows // self.cuts

    @property
    def step(self) -> int:
        """Stored rows from one matrix of a shard to the next."""
        return -(-self.shard_rows // ROW_MULTIPLE) * ROW_MULTIPLE

    @property
    def stored_rows(self) -> int:
        """Rows of the parameter, padding included."""
        return self.num * self.cuts * self.step

    def runs(self, first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
        """(stored row, matrix, its row from, to) for the stored rows [first, last) that are no padding."""
        stored = first
        while stored < last:
            place, within = divmod(stored, self.step)
            shard, index = divmod(place, self.shard_matrices)
            group, cut = divmod(shard, self.cuts)
            stop = min(self.shard_rows, within + last - stored)
            if stop > within:
                start = cut * self.shard_rows
                yield stored, group * self.shard_matrices + index, start + within, start + stop
            stored += self.step - within
