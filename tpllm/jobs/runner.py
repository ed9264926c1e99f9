"""Running a batch job from its file of rows to its committed parts."""
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tpllm import __version__
from tpllm.engine.outputs import RequestOutput
from tpllm.engine.prompts import Prompt
from tpllm.engine.sampling_params import SamplingParams
from tpllm.errors import JobError, log
from tpllm.jobs.config import JobConfig
from tpllm.jobs.engine_options import check_engine_options
from tpllm.jobs.manifest import job_section, model_section, refuse_changes
from tpllm.jobs.openai_rows import system_fingerprint
from tpllm.jobs.outputs.durable import Disk
from tpllm.jobs.outputs.folder import OutputFolder, opened_output, with_parts
from tpllm.jobs.outputs.formats import needs_columns, open_part_format, refuse_batch_row, resolve_output_format
from tpllm.jobs.outputs.journal import FinishedRow, Journal, opened_journal
from tpllm.jobs.outputs.ledger import Ledger
from tpllm.jobs.outputs.part_records import PARTS, records_of
from tpllm.jobs.outputs.remote import output_place
from tpllm.jobs.progress import Progress
from tpllm.jobs.records import Records, describe_failure
from tpllm.jobs.rows import RowError, RowRequest, read_row, row_request
from tpllm.jobs.shard import Parts
from tpllm.jobs.shard_folders import describe_idle_shard, refuse_mixture
from tpllm.jobs.signals import StopSignals
from tpllm.jobs.sources.open import open_job_source
from tpllm.jobs.sources.row_source import RowSource


@dataclasses.dataclass(frozen=True)
class JobResult:
    """How a run of a job ended.

    Attributes:
        num_rows: of the input, or of the shard.
        num_done: finished by this and earlier runs.
        num_new: finished by this run.
        num_errors: of the finished rows, those that failed.
        num_new_errors: of these, those of this run.
        signal: the signal that stopped the run, or None.
        output: the output folder.
        last_failure: the row that failed last in this run, and why; None where none did.
        has_too_many_failures: whether the run was ended by the job's ``max_failures``.
    """

    num_rows: int
    num_done: int
    num_new: int
    num_errors: int
    num_new_errors: int
    signal: int | None
    output: str
    last_failure: str | None = None
    has_too_many_failures: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether every row is finished and committed."""
        return self.num_done == self.num_rows

    @property
    def has_only_failures(self) -> bool:
        """Whether every row of the job failed."""
        return self.num_errors == self.num_rows > 0


class TooManyFailuresError(Exception):
    """More rows failed than the job's ``max_failures``."""


def run_job(job: JobConfig, *, make_llm: Callable[..., Any] | None = None, disk: Disk | None = None, sync_interval_s: float = 0.5,
            retries_failed: bool = False) -> JobResult:
    """Run a job, or go on with one that was interrupted; a complete job is left as it is and no model is loaded.

    Args:
        job: what to run.
        make_llm: makes the engine; :class:`tpllm.llm.LLM` by default.
        disk: how to write.
        sync_interval_s: the longest a finished row stays unsynced; 0 syncs each one at once.
        retries_failed: whether rows that failed in earlier runs are run again, and their parts made anew.

    Raises:
        JobError: an input that cannot be read, two rows of one custom_id, an output that cannot be written or that another process holds,
            or one that belongs to another job.
        StopRequested: a signal that came when all else was done.
    """
    make_llm = make_llm or llm_class()
    job = check_engine_options(job, make_llm)
    refuse_mixture(job)
    source, disk = open_job_source(job), disk or Disk()
    job = dataclasses.replace(job, output_format=resolve_output_format(job.output_format, source))
    path, mirror = output_place(job)
    with opened_output(path, disk, mirror) as folder, opened_journal(path, disk, sync_interval_s=sync_interval_s) as journal:
        run = _Run(job, source, folder, journal, retries_failed=retries_failed)
        with StopSignals() as stop:
            stop.before_exit(journal.sync)
            run.resume(stop)
            if not run.is_over:
                with contextlib.suppress(TooManyFailuresError):
                    run.generate(make_llm, stop)
        return run.result(stop.number)


class _RunningRow:
    """A row whose prompts are with the engine."""

    def __init__(self, request: RowRequest):
        self.request = request
        self.outputs: list[RequestOutput | None] = [None] * len(request.prompts)

    @property
    def is_finished(self) -> bool:
        """Whether all its prompts are."""
        return None not in self.outputs


class _Run:
    """One run of a job over an output folder that it holds."""

    def __init__(self, job: JobConfig, source: RowSource, folder: OutputFolder, journal: Journal, *, retries_failed: bool):
        self._job, self._source, self._folder, self._journal, self._retries_failed = job, source, folder, journal, retries_failed
        self._ledger: Ledger | None = None
        self._pending: dict[str, tuple[_RunningRow, int]] = {}
        self._changes: list[tuple[str, Any, Any]] = []
        self._num_new_errors, self._last_failure = 0, None

    def resume(self, stop: StopSignals) -> None:
        """Scan the input, compare the job with the folder's, and commit what an earlier run left ready."""
        self._summary = self._source.scan(infer_columns=needs_columns(self._job.output_format, self._source))
        self._folder.part_format = open_part_format(self._job.output_format, self._source, self._summary)
        self._section = job_section(self._job, self._summary)
        self._old = self._folder.read_manifest()
        if self._old is not None:
            self._changes = self._refuse_changes(self._section)
        with stop.held():
            self._parts = Parts(self._summary.num_rows, self._job.rows_per_part, self._job.own_shard)
            self._folder.check_parts(self._parts)
            self._ledger = Ledger(self._folder, self._journal, self._parts, check_input=self._source.check_unchanged,
                                  retries_failed=self._retries_failed)
            self._num_before = self._ledger.num_done
            if not self._parts.numbers:
                self._complete_idle_shard()
            if self._old is not None:
                self._ledger.settle()

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to do, or too many rows failed before."""
        return self._has_too_many_failures or (self._old is not None and self._ledger.is_complete)

    @property
    def _has_too_many_failures(self) -> bool:
        return self._job.max_failures is not None and self._ledger.num_failed > self._job.max_failures

    def generate(self, make_llm: Callable[..., Any], stop: StopSignals) -> None:
        """Load the model and run every row that is not finished."""
        job = self._job
        self._progress = Progress(self._parts.num_rows, self._ledger.num_done, model=job.model)
        with (contextlib.closing(self._progress),
              contextlib.closing(make_llm(job.model, mesh=job.mesh, dtype=job.dtype, seed=job.seed, **job.engine)) as llm):
            with stop.held():
                section = model_section(llm.fingerprint(), llm.default_sampling, __version__)
                self._write_manifest(section)
                self._ledger.settle()
            self._records = Records(job.seed, job.model, system_fingerprint(section), lambda: llm.get_tokenizer())
            outputs = llm.generate_iter(self._requests({**llm.default_sampling, **job.sampling}, stop), on_error="return")
            self._progress.begin()
            with contextlib.closing(outputs):
                for output in outputs:
                    with stop.held():
                        self._finish(output)
        if not self._ledger.is_complete:
            raise JobError(f"the engine ended with {self._parts.num_rows - self._ledger.num_done} rows unfinished; what is written is kept: "
                           "run the job again to go on")

    def result(self, signal: int | None) -> JobResult:
        """What this run came to."""
        ledger = self._ledger
        if ledger is None:
            return JobResult(0, 0, 0, 0, 0, signal, self._job.folder)
        return JobResult(self._parts.num_rows, ledger.num_done, ledger.num_done - self._num_before, ledger.num_failed + ledger.num_to_retry,
                         self._num_new_errors, signal, self._job.folder, self._last_failure, self._has_too_many_failures)

    def _requests(self, sampling: Mapping[str, Any], stop: StopSignals) -> Iterator[tuple[Prompt, SamplingParams]]:
        """The prompts of all unfinished rows, made as the engine asks for them; rows that cannot be run are recorded on the way."""
        number = 0
        for raw in self._source.rows(self._ledger.is_wanted):
            stop.check()
            row = None
            try:
                row = read_row(raw)
                refuse_batch_row(row.fields, self._job.output_format)
                request = row_request(row, job_seed=self._job.seed, sampling=sampling, prompt_template=self._job.prompt_template)
            except RowError as error:
                with stop.held():
                    self._record(self._records.error(raw, error, row=row), 0)
                continue
            running = _RunningRow(request)
            for place, prompt in enumerate(request.prompts):
                self._pending[str(number)] = running, place
                number += 1
                yield prompt

    def _finish(self, output: RequestOutput) -> None:
        running, place = self._pending.pop(output.request_id)
        if any(completion.finish_reason == "abort" for completion in output.outputs):
            return
        running.outputs[place] = output
        if not running.is_finished:
            return
        num_tokens = sum(len(completion.token_ids) for output in running.outputs for completion in output.outputs)
        self._record(self._records.output(running.request, running.outputs), num_tokens)

    def _record(self, row: FinishedRow, num_tokens: int) -> None:
        self._ledger.record(row)
        self._progress.advance(num_tokens, is_error=row.is_error)
        if row.is_error:
            self._num_new_errors, self._last_failure = self._num_new_errors + 1, describe_failure(row.line)
            if self._has_too_many_failures:
                raise TooManyFailuresError

    def _complete_idle_shard(self) -> None:
        """A shard without parts needs no model: what the job is, is all its manifest tells."""
        log.warning("%s", describe_idle_shard(self._parts))
        if self._old is None:
            self._folder.write_manifest(self._section)
            self._old = self._section

    def _write_manifest(self, section: Mapping[str, Any]) -> None:
        manifest = {**self._section, **section}
        if self._old is not None:
            self._changes += self._refuse_changes(section)
            if not self._changes and not self._ledger.num_to_retry:
                return
            if self._changes:
                log.warning("the environment differs from the one the job was begun in: %s", ", ".join(key for key, _, _ in self._changes))
            retried = {"num_rows_to_retry": self._ledger.num_to_retry} if self._ledger.num_to_retry else {}
            manifest["environment_changes"] = [*self._old.get("environment_changes", ()),
                                               {"num_rows_done": self._ledger.num_done, **retried, "changes": self._changes}]
            manifest = with_parts(manifest, records_of(self._old)) if PARTS in self._old else manifest
        self._folder.write_manifest(manifest)

    def _refuse_changes(self, section: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        return refuse_changes(self._old, section, output=self._job.folder, is_environment_free=self._job.allow_environment_change)


def llm_class() -> Callable[..., Any]:
    """:class:`tpllm.llm.LLM`."""
    from tpllm.llm import LLM  # loads jax, which a job that is refused early does not need
    return LLM
