"""The output folder: who holds it, what job it belongs to, and which parts are committed.

``part-00000.jsonl`` or ``part-00000.parquet`` is there if and only if the part is committed: every row of its input slice is in it or in
``part-00000.errors.jsonl`` (which exists only where a row failed), in input order. The errors file is in place before the part's own file, and what
both are is recorded before that (:mod:`tpllm.jobs.outputs.part_records`).
"""
import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from tpllm.errors import JobError
from tpllm.jobs.manifest import parse_manifest
from tpllm.jobs.outputs.durable import Disk, place, write_whole, writing_to
from tpllm.jobs.outputs.journal import JOURNAL_NAME, FinishedRow
from tpllm.jobs.outputs.lock import held_for_writing
from tpllm.jobs.outputs.part_files import JSONL, PART_NAME, TEMPORARY_NAME, PartFiles, PartFormat, errors_name, num_rows_of, part_files
from tpllm.jobs.outputs.part_records import PARTS, CommitLog, FileRecord, PartRecord, Tally, as_section, damage_of, read_records, record_of
from tpllm.jobs.shard import Parts

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
        self._log, self._records = CommitLog(path, disk), read_records(path, None)
        refuse_parts_without_manifest(path)

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
        num_errors, record = sum(row.is_error for row in read_rows()), {}
        if num_errors:
            record[errors_name(part)] = self._put(errors_name(part), (row.line + b"\n" for row in read_rows() if row.is_error), num_rows=num_errors)
        else:
            self._remove_errors(part)
        name, num_rows = self.part_format.name(part), sum(not row.is_error for row in read_rows())
        self._put(name, self.part_format.chunks(row for row in read_rows() if not row.is_error), num_rows=num_rows,
                  before_rename=lambda written: self._note(part, {**record, name: written}))
        self.committed.add(part)

    def adopt(self, files: PartFiles) -> None:
        """Put a part in place that is committed in another folder, which stays as it is; the manifest tells of it already."""
        if files.errors is None:
            self._remove_errors(files.part)
        for path in files.paths:
            with writing_to(self.path):
                place(self._disk, path, self.path / path.name)
            if self._mirror:
                self._mirror.upload(self.path / path.name)
        self.committed.add(files.part)

    def num_failed(self, part: int) -> int:
        """How many rows of a committed part are in its errors file."""
        record = self._records[part].get(errors_name(part))
        return record.num_rows if record else 0

    def failed_rows(self, part: int) -> set[int]:
        """The rows of a committed part that are in its errors file.

        Raises:
            JobError: the part is not what was committed.
        """
        if not self.num_failed(part):
            return set()
        return {json.loads(line)["row"] for line in self._verified(part).errors.read_bytes().splitlines()}

    def finished_rows(self, part: int, indices: Iterable[int]) -> Iterator[FinishedRow]:
        """The rows of a committed part's own file, as they were journalled.

        Args:
            part: its number.
            indices: of the rows, in order.

        Raises:
            JobError: the part is not what was committed.
        """
        lines = self.part_format.lines(self._verified(part).rows)
        return (FinishedRow(index, False, line) for index, line in zip(indices, lines, strict=True))

    def withdraw(self, part: int) -> None:
        """Take a committed part away whose rows a journal holds; its errors stay in their file until it is committed again."""
        with writing_to(self.path):
            self._disk.remove(part_files(self.path)[part].rows)
            self._disk.sync_folder(self.path)
        self.committed.discard(part)

    def check_parts(self, parts: Parts, *, hashes: bool = False) -> None:
        """Make sure that the committed parts are what was committed; of a part that nothing is recorded of, as where the folder was copied without
        its log, that it holds its rows, and record it.

        Args:
            parts: that the folder has in the end.
            hashes: whether their content is compared too, not only rows and bytes.

        Raises:
            JobError: a part of which a file was emptied, cut, replaced or removed.
        """
        self._records = read_records(self.path, self.read_manifest())
        for part, files in part_files(self.path).items():
            if part in parts.numbers:
                refuse_damage(files, self._records.get(part), parts.size(part), hashes=hashes)
                if part not in self._records:
                    self._note(part, record_of(files))

    def seal(self, parts: Parts) -> None:
        """Once every part is committed: let the manifest tell what its files are, and remove the log that did until now."""
        manifest = self.read_manifest()
        sealed = with_parts(manifest, {part: self._records[part] for part in parts.numbers})
        if sealed != manifest:
            self.write_manifest(sealed)
        with writing_to(self.path):
            self._log.remove()

    @property
    def records(self) -> Mapping[int, PartRecord]:
        """What the files of the committed parts are, and perhaps of more parts, which are not there any more."""
        return self._records

    def num_error_rows(self) -> int:
        """Lines in the errors files of the committed parts."""
        return sum(num_rows_of(files.errors) for files in part_files(self.path).values() if files.errors)

    def _verified(self, part: int) -> PartFiles:
        files, record = part_files(self.path)[part], self._records[part]
        refuse_damage(files, record, sum(file.num_rows for file in record.values()), hashes=True)
        return files

    def _put(self, name: str, chunks: Iterable[bytes], *, num_rows: int = 0, before_rename: Callable[[FileRecord], None] = lambda written: None
             ) -> FileRecord:
        tally = Tally()
        with writing_to(self.path):
            write_whole(self._disk, self.path / name, tally.over(chunks), before_rename=lambda: before_rename(tally.record(num_rows)))
        if self._mirror:
            self._mirror.upload(self.path / name)
        return tally.record(num_rows)

    def _note(self, part: int, record: PartRecord) -> None:
        with writing_to(self.path):
            self._log.append(part, record)
        self._records[part] = record

    def _remove_errors(self, part: int) -> None:
        """Of a part whose rows failed when it was committed before, and do not now; for good, before the part appears."""
        is_there = (self.path / errors_name(part)).exists()
        with writing_to(self.path):
            self._disk.remove(self.path / errors_name(part))
            if is_there:
                self._disk.sync_folder(self.path)


def read_manifest(folder: pathlib.Path) -> dict[str, Any] | None:
    """The manifest in a folder, or None where there is none.

    Raises:
        JobError: a damaged manifest.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JobError(f"cannot read {folder / MANIFEST}: {error.strerror}; restore it, or give this job another output") from None
    return parse_manifest(data, str(folder / MANIFEST))


def with_parts(manifest: Mapping[str, Any], records: Mapping[int, PartRecord]) -> dict[str, Any]:
    """A manifest that tells, at its end, what the files of its parts are."""
    return {**{key: value for key, value in manifest.items() if key != PARTS}, PARTS: as_section(records)}


def refuse_damage(files: PartFiles, record: PartRecord | None, num_rows: int, *, hashes: bool = False, command: str = "the job") -> None:
    """Refuse a part that is not what was committed; the arguments are those of :func:`~tpllm.jobs.outputs.part_records.damage_of`.

    Raises:
        JobError: it is another one.
    """
    if damage := damage_of(files, record, num_rows, hashes=hashes):
        raise JobError(f"{damage}: a file was cut, emptied, replaced or not copied after it was committed; copy it again, or remove it and run "
                       f"{command} again, which computes its rows again")


def refuse_what_is_no_folder(path: pathlib.Path) -> None:
    """Refuse an output that is a file or a link that leads nowhere, or that would lie in one. A link to a folder is that folder.

    Raises:
        JobError: such an output.
    """
    for above in (path, *path.parents):
        if above.is_dir():
            return
        if os.path.lexists(above):
            kind = f"a link to {os.readlink(above)}, where no folder is" if above.is_symlink() else "a file"
            raise JobError(f"cannot write to the output folder {path}: Not a directory: {above} is {kind}; move it away, or give this job "
                           "another output")


def refuse_parts_without_manifest(path: pathlib.Path) -> None:
    """Refuse a folder whose parts or journals may be of any job.

    Raises:
        JobError: such a folder, with the first of them.
    """
    names = {entry.name for entry in path.iterdir()}
    of_jobs = sorted(name for name in names if PART_NAME.fullmatch(name) or JOURNAL_NAME.fullmatch(name))
    if of_jobs and MANIFEST not in names:
        raise JobError(f"the output folder {path} holds parts of a job ({of_jobs[0]}) but no {MANIFEST}; give this job another output")


@contextlib.contextmanager
def opened_output(path: pathlib.Path, disk: Disk, mirror: Mirror | None = None) -> Iterator[OutputFolder]:
    """The output folder, made if need be, and locked against every other process until the end.

    Raises:
        JobError: a folder that cannot be made or written, that another process holds, or that holds something else.
    """
    refuse_what_is_no_folder(path)
    with writing_to(path):
        for folder in reversed([folder for folder in (path, *path.parents) if not folder.is_dir()]):
            folder.mkdir(exist_ok=True)  # another shard may make it just now
            disk.sync_folder(folder.parent)
    with held_for_writing(path):
        if mirror:
            mirror.agree(path, disk)
        yield OutputFolder(path, disk, mirror)
