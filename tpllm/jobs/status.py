"""How far a job is, read from its output while it runs, or after. Nothing is written, and a damaged folder is described as far as it can be."""
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tpllm.errors import JobError
from tpllm.jobs.manifest import parts_of
from tpllm.jobs.outputs.folder import MANIFEST, read_manifest
from tpllm.jobs.outputs.journal import journal_files, journal_rows
from tpllm.jobs.outputs.lock import writer_of
from tpllm.jobs.outputs.part_files import PartFiles, num_rows_of, part_files
from tpllm.jobs.outputs.part_records import PartRecord, damage_of, read_records
from tpllm.jobs.shard import WHOLE, Parts, Shard
from tpllm.jobs.shard_folders import find_shard_folders, local_folder
from tpllm.jobs.sources.open import need_pyarrow

COUNTS = ("num_done", "num_failed", "num_in_journals", "num_committed", "prompt_tokens", "completion_tokens")


@dataclasses.dataclass
class FolderStatus:
    """How far one folder is: a job's, or a shard's.

    Attributes:
        folder: its path.
        parts: that it will have; None where no manifest can be read.
        num_done: finished rows, failed ones among them.
        num_failed: of these, the rows that could not be run.
        num_in_journals: of these, the rows of parts that are not committed yet.
        num_committed: parts that are committed.
        pid: of the process that runs it, 0 where that is not known, None where none does.
        prompt_tokens, completion_tokens: of the finished rows; None where they were not counted.
        problems: what is wrong with the folder.
    """

    folder: str
    parts: Parts | None = None
    num_done: int = 0
    num_failed: int = 0
    num_in_journals: int = 0
    num_committed: int = 0
    pid: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether every part is committed."""
        return self.parts is not None and self.num_committed == len(self.parts.numbers)

    def as_json(self) -> dict[str, Any]:
        """All that is known, as JSON-able data."""
        parts = self.parts
        known = {"folder": self.folder, "shard": str(parts.shard) if parts and parts.shard != WHOLE else None,
                 "num_rows": parts.num_rows if parts else None, "num_parts": len(parts.numbers) if parts else None}
        own = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("folder", "parts")}
        return {**known, **own, "is_complete": self.is_complete}


@dataclasses.dataclass(frozen=True)
class JobStatus:
    """How far a job is.

    Attributes:
        output: its folder.
        whole: of the output itself, where the unsharded job was begun or shards were merged; else None.
        shards: of the shards' folders, in order.
    """

    output: str
    whole: FolderStatus | None
    shards: list[FolderStatus]

    @property
    def missing(self) -> list[Shard]:
        """The shards that have no folder."""
        found = {shard.parts.shard for shard in self.shards if shard.parts}
        return [shard for count in sorted({shard.count for shard in found}) for index in range(count) if (shard := Shard(index, count)) not in found]

    @property
    def together(self) -> FolderStatus:
        """The whole job: the output itself, or the sum of its shards."""
        if self.whole is not None:
            return self.whole
        total = FolderStatus(self.output, problems=[problem for shard in self.shards for problem in shard.problems])
        for name in COUNTS:
            counts = [getattr(shard, name) for shard in self.shards]
            setattr(total, name, None if None in counts else sum(counts))
        wholes = {dataclasses.replace(shard.parts, shard=WHOLE) for shard in self.shards if shard.parts}
        if len({shard.parts.shard.count for shard in self.shards if shard.parts}) == len(wholes) == 1:
            total.parts = wholes.pop()
        return total

    def as_json(self) -> dict[str, Any]:
        """All that is known, as JSON-able data."""
        return {"output": self.output, "is_complete": self.together.is_complete, "together": self.together.as_json(),
                "shards": [shard.as_json() for shard in self.shards], "missing_shards": list(map(str, self.missing))}


def job_status(output: str, *, counts_tokens: bool = False, verifies: bool = False) -> JobStatus:
    """Read how far a job is. Every committed part is compared with what the manifest tells of it: its rows and bytes.

    Args:
        output: its folder.
        counts_tokens: also count tokens, which parses every finished row.
        verifies: also compare the content of every part with the hash that the manifest has.

    Raises:
        JobError: no folder, or one that holds no job.
    """
    folder = local_folder(output)
    if not folder.is_dir():
        reason = "is a file" if folder.is_file() else "is not there"
        raise JobError(f"the output folder {output} {reason}; give the output folder of a job")
    names = [path.name for path in folder.iterdir()]
    has_job = MANIFEST in names or bool(journal_files(folder)) or bool(_listed(folder, []))
    shards = [_folder_status(path, counts_tokens=counts_tokens, verifies=verifies) for path in find_shard_folders(folder)]
    if not has_job and not shards and writer_of(folder) is None:
        raise JobError(f"the folder {output} holds no job: there is no {MANIFEST}, no part and no shard in it")
    is_whole = has_job or not shards
    return JobStatus(output, _folder_status(folder, counts_tokens=counts_tokens, verifies=verifies) if is_whole else None, shards)


def _folder_status(folder: pathlib.Path, *, counts_tokens: bool, verifies: bool) -> FolderStatus:
    status = FolderStatus(str(folder), pid=writer_of(folder))
    manifest = _read_manifest(folder, status)
    journals = _read_journals(folder, status)  # first: a part committed meanwhile is in either
    files = _listed(folder, status.problems)
    own = [files[part] for part in files if status.parts is None or part in status.parts.numbers]
    if len(own) < len(files):
        status.problems.append(f"{len(files) - len(own)} parts do not belong to the job of the {MANIFEST}")
    records = _read_records(folder, manifest, status)
    sound = [files for files in own if _add_part(status, files, records.get(files.part), verifies=verifies)]
    journals = [journal for journal in journals if journal.part not in files]
    for journal in journals:
        status.num_done += journal.num_rows
        status.num_in_journals += journal.num_rows
        status.num_failed += journal.num_errors
    if counts_tokens:
        try:
            _count_tokens(status, [files.rows for files in sound], journals)
        except (OSError, ValueError) as error:  # Arrow's own errors are of either kind
            status.prompt_tokens = status.completion_tokens = None
            status.problems.append(f"its tokens cannot be counted: {error}")
    return status


def _listed(folder: pathlib.Path, problems: list[str]) -> dict[int, PartFiles]:
    try:
        return part_files(folder)
    except JobError as error:
        problems.append(str(error))
        return {}


def _read_manifest(folder: pathlib.Path, status: FolderStatus) -> Mapping[str, Any] | None:
    try:
        manifest = read_manifest(folder)
        status.parts = None if manifest is None else parts_of(manifest)
    except JobError as error:
        status.problems.append(str(error))
        return None
    if manifest is None and status.pid is None:
        status.problems.append(f"there is no {MANIFEST}; nothing was begun, or it was removed")
    return manifest


def _read_records(folder: pathlib.Path, manifest: Mapping[str, Any] | None, status: FolderStatus) -> dict[int, PartRecord]:
    try:
        return read_records(folder, manifest)
    except JobError as error:
        status.problems.append(str(error))
        return {}


def _add_part(status: FolderStatus, files: PartFiles, record: PartRecord | None, *, verifies: bool) -> bool:
    """One committed part; returns whether it counts, which a damaged one does not. Where the manifest does not tell its size, its rows are what it
    has."""
    try:
        num_failed = num_rows_of(files.errors) if files.errors else 0
        num_rows = status.parts.size(files.part) if status.parts else num_rows_of(files.rows) + num_failed
        if damage := damage_of(files, record, num_rows, hashes=verifies):
            raise JobError(f"{damage}: a file was cut, emptied, replaced or not copied after it was committed, and its part does not count")
    except JobError as error:
        status.problems.append(str(error))
        return False
    status.num_done += num_rows
    status.num_failed += num_failed
    status.num_committed += 1
    return True


@dataclasses.dataclass
class _JournalCount:
    path: pathlib.Path
    part: int
    num_rows: int = 0
    num_errors: int = 0


def _read_journals(folder: pathlib.Path, status: FolderStatus) -> list[_JournalCount]:
    found = []
    for part, path in journal_files(folder).items():
        if status.parts is not None and part not in status.parts.numbers:
            status.problems.append(f"{path.name} belongs to no part of the job of the {MANIFEST}")
            continue
        count, rows, num_damaged = _JournalCount(path, part), {}, 0
        for row in journal_rows(path, status.parts.rows(part) if status.parts else None):
            num_damaged += row is None
            if row is not None:
                rows[row.index] = row.is_error
        count.num_rows, count.num_errors = len(rows), sum(rows.values())
        if num_damaged and status.pid is None:  # a line that is being written looks torn
            status.problems.append(f"{path.name} has {num_damaged} torn or damaged lines; their rows will be run again")
        found.append(count)
    return found


def _count_tokens(status: FolderStatus, parts: Iterable[pathlib.Path], journals: Iterable[_JournalCount]) -> None:
    status.prompt_tokens = status.completion_tokens = 0
    journalled = (_usage(row.line) for journal in journals for row in journal_rows(journal.path) if row and not row.is_error)
    for usage in itertools.chain(itertools.chain.from_iterable(map(_usages, parts)), journalled):
        status.prompt_tokens += usage.get("prompt_tokens") or 0
        status.completion_tokens += usage.get("completion_tokens") or 0


def _usages(path: pathlib.Path) -> Iterator[Mapping[str, int]]:
    if path.suffix == ".parquet":
        need_pyarrow(str(path))
        import pyarrow.parquet
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=["usage"]):
                yield from batch.column("usage").to_pylist()
        return
    with path.open("rb") as lines:
        yield from map(_usage, lines)


def _usage(line: bytes) -> Mapping[str, int]:
    """The ``usage`` of a finished row, also of one in OpenAI's form; nothing in a damaged line."""
    try:
        row = json.loads(line)
        usage = row["response"]["body"]["usage"] if "response" in row else row["usage"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return usage if isinstance(usage, dict) else {}
