"""Everything a run of a job would check, what it would take, and nothing written."""
import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from tpllm import __version__
from tpllm.errors import JobError
from tpllm.jobs.config import JobConfig
from tpllm.jobs.dry_run.row_counts import RowCounting, RowCounts
from tpllm.jobs.dry_run.speed import Speed, measure_speed
from tpllm.jobs.engine_options import check_engine_options
from tpllm.jobs.manifest import job_section, model_section, refuse_changes
from tpllm.jobs.outputs.folder import read_manifest, refuse_damage, refuse_parts_without_manifest, refuse_what_is_no_folder
from tpllm.jobs.outputs.formats import needs_columns, open_part_format, resolve_output_format
from tpllm.jobs.outputs.journal import journal_files, journal_rows
from tpllm.jobs.outputs.lock import writer_of
from tpllm.jobs.outputs.part_files import part_files
from tpllm.jobs.outputs.part_records import read_records
from tpllm.jobs.outputs.remote import output_place
from tpllm.jobs.runner import llm_class
from tpllm.jobs.shard import Parts
from tpllm.jobs.shard_folders import refuse_mixture
from tpllm.jobs.sources.open import open_job_source

MAX_TOKENIZED = 10_000


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What a run of a job would do.

    Attributes:
        job: the job.
        parts: that its folder would have in the end.
        num_done: rows that earlier runs finished.
        is_remote: whether the output is a URL, of which only the working folder on this machine was looked at.
        pid: of a process that runs the job now, 0 where that is not known, None where none does.
        counts: of the rows that are left; None where none is.
        context: the most tokens of prompt and completion together.
        load_seconds: that loading the model took.
        speed: measured on the job's own rows; None where none would run.
    """

    job: JobConfig
    parts: Parts
    num_done: int
    is_remote: bool = False
    pid: int | None = None
    counts: RowCounts | None = None
    context: int = 0
    load_seconds: float = 0.0
    speed: Speed | None = None

    @property
    def startup_seconds(self) -> float:
        """The seconds to load the model and compile for it."""
        return self.load_seconds + (self.speed.num_startup_seconds if self.speed else 0.0)

    @property
    def most_seconds(self) -> float | None:
        """The time if every completion is as long as it may be."""
        return self._seconds(self.counts.completion_tokens * self.counts.scale) if self.speed else None

    @property
    def likely_seconds(self) -> float | None:
        """The time if completions are as long as the sample's; None where these were not run to their end."""
        if self.speed is None or self.speed.mean_length is None:
            return None
        return self._seconds(self.counts.num_completions * self.counts.scale * self.speed.mean_length)

    def _seconds(self, completion_tokens: float) -> float:
        return self.startup_seconds + self.speed.seconds(self.counts.prefill_tokens * self.counts.scale, completion_tokens)


def dry_run(job: JobConfig, *, make_llm: Callable[..., Any] | None = None, max_tokenized: int = MAX_TOKENIZED,
            clock: Callable[[], float] = time.monotonic) -> DryRun:
    """Check a job as a run would, and find what is left to do and how long that takes; nothing is written.

    Args:
        job: the job.
        make_llm: makes the engine; :class:`tpllm.llm.LLM` by default.
        max_tokenized: rows whose prompts are tokenized; of more, an evenly spaced sample.
        clock: seconds.

    Raises:
        JobError: whatever would keep the job from running, but for a process that runs it now.
        TpllmError: a model that cannot be loaded.
    """
    make_llm = make_llm or llm_class()
    job = check_engine_options(job, make_llm)
    refuse_mixture(job)
    source = open_job_source(job)
    job = dataclasses.replace(job, output_format=resolve_output_format(job.output_format, source))
    folder, mirror = output_place(job)
    summary = source.scan(infer_columns=needs_columns(job.output_format, source))
    open_part_format(job.output_format, source, summary)
    parts = Parts(summary.num_rows, job.rows_per_part, job.own_shard)
    check_writable(folder)
    manifest = read_manifest(folder)
    _check_same(job, manifest, job_section(job, summary))
    committed, known = finished_rows(folder, parts, manifest)
    num_done = sum(parts.size(part) for part in parts.numbers if part in committed) + sum(map(len, known.values()))
    result = DryRun(job, parts, num_done, is_remote=mirror is not None, pid=writer_of(folder) if folder.exists() else None)
    if num_done == parts.num_rows:
        return result
    start = clock()
    with contextlib.closing(make_llm(job.model, mesh=job.mesh, dtype=job.dtype, seed=job.seed, **job.engine)) as llm:
        load_seconds = clock() - start
        _check_same(job, manifest, model_section(llm.fingerprint(), llm.default_sampling, __version__))
        counting = RowCounting(job, llm, num_left=parts.num_rows - num_done, max_tokenized=max_tokenized)
        for raw in source.rows(lambda index: parts.lack(index, committed, known)):
            counting.add(raw)
        speed = measure_speed(llm, counting.sample, clock=clock) if counting.sample else None
        return dataclasses.replace(result, counts=counting.counts, context=llm.shapes.max_model_len, load_seconds=load_seconds, speed=speed)


def check_writable(folder: pathlib.Path) -> None:
    """Refuse a folder that could not be made or written, as far as that can be told without trying.

    Raises:
        JobError: it is no folder, or may not be written.
    """
    refuse_what_is_no_folder(folder.absolute())
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise JobError(f"cannot write to the output folder {folder}: Permission denied ({nearest}); make the folder writable, or give this job "
                       "another output")


def finished_rows(folder: pathlib.Path, parts: Parts, manifest: Mapping[str, Any] | None) -> tuple[set[int], dict[int, set[int]]]:
    """The committed parts of a folder, and the rows in the journals of other parts; nothing where there is no folder.

    Raises:
        JobError: parts without a manifest, or one that is not what was committed.
    """
    if not folder.exists():
        return set(), {}
    journals = {part: {row.index for row in journal_rows(path, parts.rows(part)) if row} for part, path in journal_files(folder).items()}
    committed = part_files(folder)  # after the journals are read: a part committed meanwhile is in either
    refuse_parts_without_manifest(folder)
    records = read_records(folder, manifest)
    for part, files in committed.items():
        if part in parts.numbers:
            refuse_damage(files, records.get(part), parts.size(part))
    return set(committed), {part: rows for part, rows in journals.items() if part not in committed and part in parts.numbers}


def _check_same(job: JobConfig, manifest: Mapping[str, Any] | None, section: Mapping[str, Any]) -> None:
    if manifest is not None:
        refuse_changes(manifest, section, output=job.folder, is_environment_free=job.allow_environment_change)
