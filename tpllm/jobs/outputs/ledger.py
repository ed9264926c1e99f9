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

    With ``retries_failed`` rows that failed are wanted again. A committed part stays as it is until the first of them is finished: then its other
    rows are put into its journal, all at once, the part's own file is removed, and the part is one that lacks its failed rows. Its errors file stays
    until it is committed again.

    Args:
        folder: the output.
        journal: of the parts that are not committed.
        parts: that the folder has in the end.
        check_input: called with the rows of a part before it is committed; raises where their input is not what it was.
        retries_failed: whether rows that failed are run again.

    Attributes:
        num_done: finished rows, of this run and earlier ones; of those that are run again, those that are finished again.
        num_failed: of these, those that could not be run.
    """

    def __init__(self, folder: OutputFolder, journal: Journal, parts: Parts, *, check_input: Callable[[range], None] = lambda rows: None,
                 retries_failed: bool = False):
        self._folder, self._journal, self._parts, self._check_input = folder, journal, parts, check_input
        self._lock = threading.RLock()
        self._missing: dict[int, int] = {}
        journal.drop_foreign(parts)
        self._known = {part: journal.rows(part) for part in journal.parts if part not in folder.committed}
        self.num_done = sum(parts.size(part) for part in folder.committed if part in parts.numbers) + sum(map(len, self._known.values()))
        own = [part for part in folder.committed if part in parts.numbers]
        self.num_failed = sum(map(folder.num_failed, own)) + sum(len(journal.failed_rows(part)) for part in self._known)
        self._to_retry: set[int] = set()
        if retries_failed:
            self._to_retry.update(*map(folder.failed_rows, own), *map(journal.failed_rows, self._known))
            self._known = {part: rows - self._to_retry for part, rows in self._known.items()}
            self.num_done, self.num_failed = self.num_done - self.num_failed, 0

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
    def num_to_retry(self) -> int:
        """Rows that failed before and are not run again yet."""
        return len(self._to_retry)

    @property
    def is_complete(self) -> bool:
        """Whether every part is committed, and no row is to be run again."""
        return not self._to_retry and all(part in self._folder.committed for part in self._parts.numbers)

    def is_wanted(self, index: int) -> bool:
        """Whether a row is one of this job's, or shard's, that no earlier run finished, or one to be run again."""
        return index in self._to_retry or self._parts.lack(index, self._folder.committed, self._known)

    def record(self, row: FinishedRow) -> None:
        """Journal a finished row; commit its part if it was the last one.

        Raises:
            JobError: the disk refuses it.
        """
        with self._lock:
            part = self._parts.part_of(row.index)
            if part in self._folder.committed:
                self._reopen(part)
            self._to_retry.discard(row.index)
            self._journal.append(part, row)
            self._missing[part] = self._num_missing(part) - 1
            self.num_done += 1
            self.num_failed += row.is_error
            if self._missing[part] == 0:
                self._commit(part)
                if self.is_complete:
                    self._folder.seal(self._parts)

    def _reopen(self, part: int) -> None:
        kept = [index for index in self._parts.rows(part) if index not in self._to_retry]
        self._journal.fill(part, self._folder.finished_rows(part, kept))
        self._folder.withdraw(part)
        self._known[part] = set(kept)

    def _commit(self, part: int) -> None:
        self._check_input(self._parts.rows(part))
        self._journal.sync()
        self._folder.commit(part, lambda: self._journal.read(part))
        self._journal.discard(part)
        self._missing.pop(part, None)

    def _num_missing(self, part: int) -> int:
        return self._missing.get(part, self._parts.size(part) - len(self._known.get(part, ())))
