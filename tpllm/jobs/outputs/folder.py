"""The output folder: who holds it, what job it belongs to, and which parts are committed.

``part-00000.jsonl`` or ``part-00000.parquet`` is there if and only if the part is committed: every row of its input slice is in it or in
``part-00000.errors.jsonl`` (which exists only where a row failed), in input order. The errors file is in place before the part's own file.
"""
import contextlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from tpllm.errors import JobError
from tpllm.jobs.outputs.durable import Disk, place, write_whole, writing_to
from tpllm.jobs.outputs.journal import JOURNAL_NAME, FinishedRow
from tpllm.jobs.outputs.lock import held_for_writing
from tpllm.jobs.outputs.part_files import JSONL, TEMPORARY_NAME, PartFiles, PartFormat, errors_name, num_rows_of, part_files

MANIFEST = "manifest.json"


class Mirror(Protocol):
    """Another place that gets a copy of all that is committed; see :mod:`tpllm.jobs.outputs.remote`."""

    def agree(self, folder: pathlib.Path, disk: Disk) -> None:
        """Before anything else: copy to each side what only the other has."""

    def upload(self, path: pathlib.Path) -> None:
        """Copy one file that was just put in place."""


class OutputFolder:
    """One job's output, held by this process; made by :func:`opened_output`.

    Attributes:
        path: the folder.
        committed: the numbers of the parts that are in place.
        part_format: how parts are written; JSONL until the job says otherwise.
    """

    def __init__(self, path: pathlib.Path, disk: Disk, mirror: Mirror | None = None):
        self.path = path
        self.part_format: PartFormat = JSONL
        self._disk, self._mirror = disk, mirror
        names = [entry.name for entry in path.iterdir()]
        with writing_to(path):
            for name in filter(TEMPORARY_NAME.fullmatch, names):
                disk.remove(path / name)
        self.committed = set(part_files(path))
        if (self.committed or any(map(JOURNAL_NAME.fullmatch, names))) and MANIFEST not in names:
            raise JobError(f"the output folder {path} holds parts of a job but no {MANIFEST}; give this job another output")

    def read_manifest(self) -> dict[str, Any] | None:
        """The manifest of the job that this folder belongs to, or None for a new one.

        Raises:
            JobError: a damaged manifest.
        """
        return read_manifest(self.path)

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Put the manifest in place."""
        text = json.dumps(manifest, indent=1, ensure_ascii=True) + "\n"
        self._put(MANIFEST, [text.encode()])

    def commit(self, part: int, read_rows: Callable[[], Iterable[FinishedRow]]) -> None:
        """Put a finished part in place.

        Args:
            part: its number.
            read_rows: gives all its rows in input order; called more than once, so that they need not all be in memory.
        """
        if any(row.is_error for row in read_rows()):
            self._put(errors_name(part), (row.line + b"\n" for row in read_rows() if row.is_error))
        self._put(self.part_format.name(part), self.part_format.chunks(row for row in read_rows() if not row.is_error))
        self.committed.add(part)

    def adopt(self, files: PartFiles) -> None:
        """Put a part in place that is committed in another folder, which stays as it is."""
        if files.errors is None:
            with writing_to(self.path):
                self._disk.remove(self.path / errors_name(files.part))
        for path in filter(None, (files.errors, files.rows)):
            with writing_to(self.path):
                place(self._disk, path, self.path / path.name)
            if self._mirror:
                self._mirror.upload(self.path / path.name)
        self.committed.add(files.part)

    def num_error_rows(self) -> int:
        """Lines in the errors files of the committed parts."""
        return sum(num_rows_of(files.errors) for files in part_files(self.path).values() if files.errors)

    def _put(self, name: str, chunks: Iterable[bytes]) -> None:
        with writing_to(self.path):
            write_whole(self._disk, self.path / name, chunks)
        if self._mirror:
            self._mirror.upload(self.path / name)


def read_manifest(folder: pathlib.Path) -> dict[str, Any] | None:
    """The manifest in a folder, or None where there is none.

    Raises:
        JobError: a damaged manifest.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise JobError(f"cannot read {folder / MANIFEST}: {error}; give this job another output") from None
    if not isinstance(manifest, dict):
        raise JobError(f"{folder / MANIFEST} is no manifest; give this job another output")
    return manifest


@contextlib.contextmanager
def opened_output(path: pathlib.Path, disk: Disk, mirror: Mirror | None = None) -> Iterator[OutputFolder]:
    """The output folder, made if need be, and locked against every other process until the end.

    Raises:
        JobError: a folder that cannot be made or written, that another process holds, or that holds something else.
    """
    with writing_to(path):
        for folder in reversed([folder for folder in (path, *path.parents) if not folder.is_dir()]):
            folder.mkdir(exist_ok=True)  # another shard may make it just now
            disk.sync_folder(folder.parent)
    with held_for_writing(path):
        if mirror:
            mirror.agree(path, disk)
        yield OutputFolder(path, disk, mirror)
