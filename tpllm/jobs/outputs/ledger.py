"""Which rows are finished: each is journalled, and a part is committed when its last row is."""
import threading
from collections.abc import Callable

from tpllm.jobs.outputs.folder import OutputFolder
from tpllm.jobs.outputs.journal import FinishedRow, Journal
from tpllm.jobs.shard import Parts


class Ledger:
    """The finished rows of a job, in its journal and its committed parts.

    A row is recorded once, in any order. A part is committed in this order: its rows' input is looked at, its journal is synced, its errors file and
    then its own file are put in place, its journal is removed. A process that dies between any two of these leaves a folder from which the rest
    follows.

    Args:
        folder: the output.
        journal: of the parts that are not committed.
        parts: that the folder has in the end.
        check_input: called with the rows of a part before it is committed; raises where their input is not what it was.

    Attributes:
        num_done: finished rows, of this run and earlier ones.
    """

    def __init__(self, folder: OutputFolder, journal: Journal, parts: Parts, *, check_input: Callable[[range], None] = lambda rows: None):
        self._folder, self._journal, self._parts, self._check_input = folder, journal, parts, check_input
        self._lock = threading.RLock()
        self._missing: dict[int, int] = {}
        journal.drop_foreign(parts)
        self._known = {part: journal.rows(part) for part in journal.parts if part not in folder.committed}
        self.num_done = sum(parts.size(part) for part in folder.committed if part in parts.numbers) + sum(map(len, self._known.values()))

    def settle(self) -> None:
        """Finish what an earlier run was about to do: remove the journals of committed parts, commit parts whose rows are all there."""
        for part in self._journal.parts:
            if part in self._folder.committed:
                self._journal.discard(part)
            elif self._num_missing(part) == 0:
                self._commit(part)
        if self._parts.is_empty and not self.is_complete:
            self._commit(0)
        if self.is_complete:
            self._folder.seal(self._parts)

    @property
    def is_complete(self) -> bool:
        """Whether every part is committed."""
        return all(part in self._folder.committed for part in self._parts.numbers)

    def is_wanted(self, index: int) -> bool:
        """Whether a row is one of this job's, or shard's, that no earlier run finished."""
        return self._parts.lack(index, self._folder.committed, self._known)

    def record(self, row: FinishedRow) -> None:
        """Journal a finished row; commit its part if it was the last one.

        Raises:
            JobError: the disk refuses it.
        """
        with self._lock:
            part = self._parts.part_of(row.index)
            self._journal.append(part, row)
            self._missing[part] = self._num_missing(part) - 1
            self.num_done += 1
            if self._missing[part] == 0:
                self._commit(part)
                if self.is_complete:
                    self._folder.seal(self._parts)

    def _commit(self, part: int) -> None:
        self._check_input(self._parts.rows(part))
        self._journal.sync()
        self._folder.commit(part, lambda: self._journal.read(part))
        self._journal.discard(part)
        self._missing.pop(part, None)

    def _num_missing(self, part: int) -> int:
        return self._missing.get(part, self._parts.size(part) - len(self._known.get(part, ())))
