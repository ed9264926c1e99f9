"""The output folder: who holds it, what job it belongs to, and which parts are committed.

``part-00000.jsonl`` is there if and only if the part is committed: every row of its input slice is in it or in ``part-00000.errors.jsonl``
(which exists only where a row failed), in input order. The errors file is in place before the part's own file.
"""
import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tpllm.errors import JobError
from tpllm.jobs.durable import Disk, write_whole, writing_to
from tpllm.jobs.journal import JOURNAL_NAME, FinishedRow

MANIFEST = "manifest.json"
LOCK = ".lock"
PART_NAME = re.compile(r"part-(\d{5,})\.jsonl")
TEMPORARY_NAME = re.compile(r"(manifest\.json|part-\d{5,}(\.errors)?\.jsonl)\.tmp")


class OutputFolder:
    """One job's output, held by this process; made by :func:`opened_output`."""

    def __init__(self, path: pathlib.Path, disk: Disk):
        self.path = path
        self._disk = disk
        names = [entry.name for entry in path.iterdir()]
        with writing_to(path):
            for name in filter(TEMPORARY_NAME.fullmatch, names):
                disk.remove(path / name)
        self.committed = {int(match[1]) for name in names if (match := PART_NAME.fullmatch(name))}
        if (self.committed or any(map(JOURNAL_NAME.fullmatch, names))) and MANIFEST not in names:
            raise JobError(f"the output folder {path} holds parts of a job but no {MANIFEST}; give this job another output")

    def read_manifest(self) -> dict[str, Any] | None:
        """The manifest of the job that this folder belongs to, or None for a new one.

        Raises:
            JobError: a damaged manifest.
        """
        try:
            manifest = json.loads((self.path / MANIFEST).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise JobError(f"cannot read {self.path / MANIFEST}: {error}; give this job another output") from None
        if not isinstance(manifest, dict):
            raise JobError(f"{self.path / MANIFEST} is no manifest; give this job another output")
        return manifest

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Put the manifest in place."""
        text = json.dumps(manifest, indent=1, ensure_ascii=True) + "\n"
        with writing_to(self.path):
            write_whole(self._disk, self.path / MANIFEST, [text.encode()])

    def commit(self, part: int, read_rows: Callable[[], Iterable[FinishedRow]]) -> None:
        """Put a finished part in place.

        Args:
            part: its number.
            read_rows: gives all its rows in input order; called more than once, so that they need not all be in memory.
        """
        with writing_to(self.path):
            if any(row.is_error for row in read_rows()):
                write_whole(self._disk, self.path / f"part-{part:05d}.errors.jsonl", (row.line + b"\n" for row in read_rows() if row.is_error))
            write_whole(self._disk, self.path / f"part-{part:05d}.jsonl", (row.line + b"\n" for row in read_rows() if not row.is_error))
        self.committed.add(part)

    def num_error_rows(self) -> int:
        """Lines in the errors files of the committed parts."""
        total = 0
        for path in self.path.glob("part-*.errors.jsonl"):
            with path.open("rb") as lines:
                total += sum(1 for _ in lines)
        return total


@contextlib.contextmanager
def opened_output(path: pathlib.Path, disk: Disk) -> Iterator[OutputFolder]:
    """The output folder, made if need be, and locked against every other process until the end.

    Raises:
        JobError: a folder that cannot be made or written, that another process holds, or that holds something else.
    """
    with writing_to(path):
        if not path.is_dir():
            path.mkdir(parents=True)
            disk.sync_folder(path.parent)
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _lock(lock, path)
        yield OutputFolder(path, disk)
    finally:
        os.close(lock)


def _lock(fd: int, path: pathlib.Path) -> None:
    with writing_to(path):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            raise JobError(f"another process{f' (pid {holder})' if holder else ''} is running the job in {path}; wait for it or stop it, "
                           "or give this job another output") from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
