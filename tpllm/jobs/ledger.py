"""Which rows are finished: each is journalled, and a part is committed when its last row is."""
import threading

from tpllm.jobs.journal import FinishedRow, Journal
from tpllm.jobs.output import OutputFolder


class Ledger:
    """The finished rows of a job, in its journal and its committed parts.

    A row is recorded once, in any order. A part is committed in this order: its journal is synced, its errors file and then its own file are
    put in place, its journal is removed. A process that dies between any two of these leaves a folder from which the rest follows.

    Args:
        folder: the output.
        journal: of the parts that are not committed.
        num_rows: of the input.
        rows_per_part: rows of one part.

    Attributes:
        num_done: finished rows, of this run and earlier ones.
    """

    def __init__(self, folder: OutputFolder, journal: Journal, *, num_rows: int, rows_per_part: int):
        self._folder, self._journal = folder, journal
        self._num_rows, self._rows_per_part = num_rows, rows_per_part
        self._lock = threading.RLock()
        self._missing: dict[int, int] = {}
        self._known = {part: journal.rows(part) for part in journal.parts if part not in folder.committed}
        self.num_done = sum(map(self._size, folder.committed)) + sum(map(len, self._known.values()))

    def settle(self) -> None:
        """Finish what an earlier run was about to do: remove the journals of committed parts, commit parts whose rows are all there."""
        for part in self._journal.parts:
            if part in self._folder.committed:
                self._journal.discard(part)
            elif self._num_missing(part) == 0:
                self._commit(part)
        if self._num_rows == 0 and not self._folder.committed:
            self._commit(0)

    @property
    def num_parts(self) -> int:
        """How many parts the input makes; one empty part where it has no rows."""
        return max(1, -(-self._num_rows // self._rows_per_part))

    @property
    def is_complete(self) -> bool:
        """Whether every part is committed."""
        return len(self._folder.committed) == self.num_parts

    def is_done(self, index: int) -> bool:
        """Whether a row was finished by an earlier run."""
        part = index // self._rows_per_part
        return part in self._folder.committed or index in self._known.get(part, ())

    def record(self, row: FinishedRow) -> None:
        """Journal a finished row; commit its part if it was the last one.

        Raises:
            JobError: the disk refuses it.
        """
        with self._lock:
            part = row.index // self._rows_per_part
            self._journal.append(part, row)
            self._missing[part] = self._num_missing(part) - 1
            self.num_done += 1
            if self._missing[part] == 0:
                self._commit(part)

    def _commit(self, part: int) -> None:
        self._journal.sync()
        self._folder.commit(part, lambda: self._journal.read(part))
        self._journal.discard(part)
        self._missing.pop(part, None)

    def _num_missing(self, part: int) -> int:
        return self._missing.get(part, self._size(part) - len(self._known.get(part, ())))

    def _size(self, part: int) -> int:
        return max(0, min(self._rows_per_part, self._num_rows - part * self._rows_per_part))
