"""The journal: every finished row of a part that is not committed yet, appended to that part's own file.

A line is ``crc32 row kind payload``, the checksum in eight hex digits over all that follows it, ``kind`` ``row`` or ``error``, and the payload
the line that the part will hold. A process that dies leaves whole lines and at most one torn one; a machine that loses power leaves at least
what was synced. So recovery keeps every line whose checksum holds and cuts off what follows the last of them.
"""
import contextlib
import dataclasses
import os
import pathlib
import re
import threading
import zlib
from collections.abc import Iterable, Iterator

from tpllm.errors import JobError, log
from tpllm.jobs.outputs.durable import Disk, write_whole, writing_to
from tpllm.jobs.shard import Parts

RECORD = re.compile(rb"(?P<checksum>[0-9a-f]{8}) (?P<index>\d{1,18}) (?P<kind>row|error) (?P<payload>[^\n]*)\n")
JOURNAL_NAME = re.compile(r"journal-(\d{5}|[1-9]\d{5,})\.jsonl")


@dataclasses.dataclass(frozen=True)
class FinishedRow:
    """One row as its part will hold it.

    Attributes:
        index: its place in the input, from 0.
        is_error: whether it belongs in the part's errors file.
        line: one JSON object in UTF-8, without a newline.
    """

    index: int
    is_error: bool
    line: bytes


def encode(row: FinishedRow) -> bytes:
    """A row as a line of the journal."""
    body = b"%d %s %s" % (row.index, b"error" if row.is_error else b"row", row.line)
    return b"%08x %s\n" % (zlib.crc32(body), body)


def decode(line: bytes) -> FinishedRow | None:
    """The row of a journal line, or None where the line is torn or damaged."""
    parts = RECORD.fullmatch(line)
    if parts is None or parts["checksum"] != b"%08x" % zlib.crc32(line[9:-1]):
        return None
    return FinishedRow(int(parts["index"]), parts["kind"] == b"error", parts["payload"])


def journal_files(folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """The journals of a folder, by their parts, in order."""
    return {int(match[1]): path for path in sorted(folder.iterdir()) if (match := JOURNAL_NAME.fullmatch(path.name)) and path.is_file()}


def journal_rows(path: pathlib.Path, rows: range | None = None) -> Iterator[FinishedRow | None]:
    """The rows of a part's journal for who only reads it; no rows where the part was committed just now.

    Args:
        path: the journal.
        rows: those of its part, where they are known.

    Yields:
        Each row; None for a damaged line, or for a row of another part.

    Raises:
        JobError: it cannot be read.
    """
    try:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as lines:
            for row in map(decode, lines):
                yield row if row is None or rows is None or row.index in rows else None
    except OSError as error:
        raise JobError(f"cannot read {path}: {error.strerror}") from None


@dataclasses.dataclass
class _PartFile:
    """One part's journal: the open file, its length, where each row lies in it, which of them failed, and whether some of it is not synced."""

    fd: int
    num_bytes: int
    spans: dict[int, tuple[int, int]]
    failed: set[int]
    is_dirty: bool

    def note(self, row: FinishedRow, span: tuple[int, int]) -> None:
        """Take in a row that lies there; a later one of the same number takes its place."""
        self.spans[row.index] = span
        (self.failed.add if row.is_error else self.failed.discard)(row.index)


class Journal:
    """The journals of all parts that are not committed. Safe to use from several threads."""

    def __init__(self, folder: pathlib.Path, disk: Disk, *, sync_interval_s: float = 0.5):
        """Open the journals of ``folder``.

        Args:
            folder: the job's output.
            disk: how to write.
            sync_interval_s: the longest a finished row stays unsynced; 0 syncs each one at once, without a thread.
        """
        self.num_damaged = 0
        self._folder, self._disk, self._interval_s = folder, disk, sync_interval_s
        self._files: dict[int, _PartFile] = {}
        self._lock = threading.RLock()
        self._has_new_names = False
        self._failure: BaseException | None = None
        self._is_closed = threading.Event()
        with writing_to(folder):
            for part, path in journal_files(folder).items():
                self._files[part] = self._recover(path)
                self._has_new_names = True
        self._thread = threading.Thread(target=self._sync_regularly, name="tpllm-journal", daemon=True) if sync_interval_s else None
        if self._thread:
            self._thread.start()

    def _recover(self, path: pathlib.Path) -> _PartFile:
        file = _PartFile(self._disk.create(path), 0, {}, set(), is_dirty=True)
        end = 0
        with path.open("rb") as lines:
            for line in lines:
                row = decode(line)
                if row is not None:
                    file.note(row, (end, len(line)))
                    file.num_bytes = end + len(line)
                else:
                    self.num_damaged += 1
                end += len(line)
        if file.num_bytes < end:
            self._disk.truncate(file.fd, file.num_bytes)
        return file

    def drop_foreign(self, parts: Parts) -> None:
        """Forget what is not the job's, as where a file was renamed or copied from elsewhere: rows that are not of the part in whose journal they
        stand, which are run again, and journals of parts that the job has not, which are left as they are."""
        with self._lock:
            for part, file in list(self._files.items()):
                if part not in parts.numbers:
                    log.warning("%s belongs to no part of this job and is left alone", self._path(part))
                    os.close(self._files.pop(part).fd)
                    continue
                if foreign := [index for index in file.spans if index not in parts.rows(part)]:
                    log.warning("%s has %d rows of other parts, which do not count", self._path(part), len(foreign))
                for index in foreign:
                    del file.spans[index]
                    file.failed.discard(index)

    @property
    def parts(self) -> list[int]:
        """The parts that have a journal, in order."""
        return sorted(self._files)

    def rows(self, part: int) -> set[int]:
        """The rows that a part's journal holds."""
        file = self._files.get(part)
        return set(file.spans) if file else set()

    def failed_rows(self, part: int) -> set[int]:
        """Those of them that could not be run."""
        file = self._files.get(part)
        return set(file.failed) if file else set()

    def fill(self, part: int, rows: Iterable[FinishedRow]) -> None:
        """Begin a part's journal with rows that are finished already; all of them are on the device when this returns."""
        with self._lock, writing_to(self._folder):
            write_whole(self._disk, self._path(part), map(encode, rows))
            self._files[part] = self._recover(self._path(part))

    def append(self, part: int, row: FinishedRow) -> None:
        """Write one finished row.

        Raises:
            JobError: the disk refuses it, or refused an earlier sync.
        """
        line = encode(row)
        with self._lock, writing_to(self._folder):
            if self._failure is not None:
                raise self._failure
            file = self._files.get(part)
            if file is None:
                file = self._files[part] = _PartFile(self._disk.create(self._path(part)), 0, {}, set(), is_dirty=True)
                self._has_new_names = True
            self._disk.append(file.fd, line)
            file.note(row, (file.num_bytes, len(line)))
            file.num_bytes += len(line)
            file.is_dirty = True
            if not self._interval_s:
                self._sync()

    def sync(self) -> None:
        """Wait until every row appended so far is on the device."""
        with self._lock, writing_to(self._folder):
            self._sync()

    def read(self, part: int) -> Iterator[FinishedRow]:
        """A part's rows in input order."""
        file = self._files.get(part)
        for index in sorted(file.spans) if file else ():
            start, num_bytes = file.spans[index]
            row = decode(os.pread(file.fd, num_bytes, start))
            if row is None or row.index != index:
                raise JobError(f"row {index} in {self._path(part)} changed while the job ran; run the job again, which computes the row again")
            yield row

    def discard(self, part: int) -> None:
        """Forget a part, once it is committed."""
        with self._lock, writing_to(self._folder):
            file = self._files.pop(part, None)
            if file is not None:
                os.close(file.fd)
                self._disk.remove(self._path(part))

    def close(self) -> None:
        """Sync what is there and close the files; harmless when repeated."""
        self._is_closed.set()
        if self._thread:
            self._thread.join()
        try:
            self.sync()
        finally:
            for file in self._files.values():
                os.close(file.fd)
            self._files.clear()

    def _path(self, part: int) -> pathlib.Path:
        return self._folder / f"journal-{part:05d}.jsonl"

    def _sync(self) -> None:
        for file in self._files.values():
            if file.is_dirty:
                self._disk.sync(file.fd)
                file.is_dirty = False
        if self._has_new_names:
            self._disk.sync_folder(self._folder)
            self._has_new_names = False

    def _sync_regularly(self) -> None:
        while not self._is_closed.wait(self._interval_s):
            with self._lock:
                try:
                    self._sync()
                except OSError as error:  # raised to the job at its next row
                    self._failure = error
                    return


@contextlib.contextmanager
def opened_journal(folder: pathlib.Path, disk: Disk, *, sync_interval_s: float) -> Iterator[Journal]:
    """A journal that is synced and closed at the end, whatever ends it."""
    journal = Journal(folder, disk, sync_interval_s=sync_interval_s)
    try:
        yield journal
    finally:
        journal.close()
