"""Running a batch job from its file of rows to its committed parts."""
import contextlib
import dataclasses
import inspect
import itertools
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tpllm import __version__
from tpllm.engine.outputs import RequestOutput
from tpllm.errors import JobError
from tpllm.jobs.config import JOB_KEYS, JobConfig, check_keys
from tpllm.jobs.durable import Disk
from tpllm.jobs.journal import Journal, opened_journal
from tpllm.jobs.ledger import Ledger
from tpllm.jobs.manifest import job_section, model_section, refuse_changes
from tpllm.jobs.output import OutputFolder, opened_output
from tpllm.jobs.progress import Progress
from tpllm.jobs.records import error_row, output_row
from tpllm.jobs.rows import Row, RowError, RowRequest, read_row, row_request
from tpllm.jobs.signals import StopSignals
from tpllm.jobs.source import RowSource, open_source

log = logging.getLogger("tpllm")

NOT_FOR_YAML = ("rules",)
"""Arguments of the engine's constructor that are Python objects."""


@dataclasses.dataclass(frozen=True)
class JobResult:
    """How a run of a job ended.

    Attributes:
        num_rows: of the input.
        num_done: finished by this and earlier runs.
        num_new: finished by this run.
        num_errors: of the finished rows, those in the errors files of committed parts.
        signal: the signal that stopped the run, or None.
        output: the output folder.
    """

    num_rows: int
    num_done: int
    num_new: int
    num_errors: int
    signal: int | None
    output: str

    @property
    def is_complete(self) -> bool:
        """Whether every row is finished and committed."""
        return self.num_done == self.num_rows


def run_job(job: JobConfig, *, make_llm: Callable[..., Any] | None = None, disk: Disk | None = None,
            sync_interval_s: float = 0.5) -> JobResult:
    """Run a job, or go on with one that was interrupted; a complete job is left as it is and no model is loaded.

    Args:
        job: what to run.
        make_llm: makes the engine; :class:`tpllm.llm.LLM` by default.
        disk: how to write.
        sync_interval_s: the longest a finished row stays unsynced; 0 syncs each one at once.

    Raises:
        JobError: an input that cannot be read, two rows of one custom_id, an output that cannot be written or that another process holds,
            or one that belongs to another job.
        StopRequested: a signal that came when all else was done.
    """
    make_llm = make_llm or _llm_class()
    check_engine_options(job, make_llm)
    source, disk = open_source(job.input), disk or Disk()
    with opened_output(pathlib.Path(job.output), disk) as folder, opened_journal(folder.path, disk, sync_interval_s=sync_interval_s) as journal:
        run = _Run(job, source, folder, journal)
        with StopSignals() as stop:
            stop.before_exit(journal.sync)
            run.resume(stop)
            if not run.is_complete:
                run.generate(make_llm, stop)
        return run.result(stop.number)


def check_engine_options(job: JobConfig, make_llm: Callable[..., Any]) -> None:
    """Refuse ``engine`` keys that the engine's constructor does not take.

    Raises:
        JobError: an unknown key; the nearest known one is named. Or ``batch_invariant``: a job that resumes must give the rows it would have
            given, whatever then shares their batch.
    """
    if "batch_invariant" in job.engine:
        raise JobError("engine.batch_invariant cannot be set in a job: its rows never depend on their batch, so that a job that is resumed "
                       "gives the same ones; leave it out")
    parameters = inspect.signature(make_llm).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        known = [parameter.name for parameter in parameters
                 if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in (*JOB_KEYS, *NOT_FOR_YAML)]
        check_keys(job.engine, known, prefix="engine.")


class _Run:
    """One run of a job over an output folder that it holds."""

    def __init__(self, job: JobConfig, source: RowSource, folder: OutputFolder, journal: Journal):
        self._job, self._source, self._folder, self._journal = job, source, folder, journal
        self._ledger: Ledger | None = None
        self._pending: dict[str, Row] = {}
        self._changes: list[tuple[str, Any, Any]] = []

    def resume(self, stop: StopSignals) -> None:
        """Scan the input, compare the job with the folder's, and commit what an earlier run left ready."""
        self._summary = self._source.scan()
        self._section = job_section(self._job, self._summary)
        self._old = self._folder.read_manifest()
        if self._old is not None:
            self._changes = self._refuse_changes(self._section)
        with stop.held():
            self._ledger = Ledger(self._folder, self._journal, num_rows=self._summary.num_rows, rows_per_part=self._job.rows_per_part)
            self._num_before = self._ledger.num_done
            if self._old is not None:
                self._ledger.settle()

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to do."""
        return self._old is not None and self._ledger.is_complete

    def generate(self, make_llm: Callable[..., Any], stop: StopSignals) -> None:
        """Load the model and run every row that is not finished."""
        job = self._job
        llm = make_llm(job.model, mesh=job.mesh, dtype=job.dtype, seed=job.seed, **job.engine)
        with contextlib.closing(llm):
            with stop.held():
                self._write_manifest(model_section(llm.fingerprint(), llm.default_sampling, __version__))
                self._ledger.settle()
            requests, again = itertools.tee(self._requests({**llm.default_sampling, **job.sampling}, stop))
            outputs = llm.generate_iter((request.prompt for request in requests), (request.params for request in again), on_error="return")
            self._progress = Progress(self._summary.num_rows, self._ledger.num_done)
            with contextlib.closing(self._progress), contextlib.closing(outputs):
                for output in outputs:
                    with stop.held():
                        self._finish(output)
        if not self._ledger.is_complete:
            raise JobError(f"the engine ended with {self._summary.num_rows - self._ledger.num_done} rows unfinished; what is written is kept: "
                           "run the job again to go on")

    def result(self, signal: int | None) -> JobResult:
        """What this run came to."""
        if self._ledger is None:
            return JobResult(0, 0, 0, 0, signal, self._job.output)
        num_done = self._ledger.num_done
        return JobResult(self._summary.num_rows, num_done, num_done - self._num_before, self._folder.num_error_rows(), signal, self._job.output)

    def _requests(self, sampling: Mapping[str, Any], stop: StopSignals) -> Iterator[RowRequest]:
        """The requests of all unfinished rows, made as the engine asks for them; rows that cannot be run are recorded on the way."""
        number = 0
        for raw in self._source.rows():
            stop.check()
            if self._ledger.is_done(raw.index):
                continue
            row = None
            try:
                row = read_row(raw)
                request = row_request(row, job_seed=self._job.seed, sampling=sampling)
            except RowError as error:
                with stop.held():
                    self._ledger.record(error_row(raw, str(error), row=row))
                    self._progress.advance(0, is_error=True)
                continue
            self._pending[str(number)] = row
            number += 1
            yield request

    def _finish(self, output: RequestOutput) -> None:
        row = self._pending.pop(output.request_id)
        if any(completion.finish_reason == "abort" for completion in output.outputs):
            return
        finished = output_row(row, output)
        self._ledger.record(finished)
        self._progress.advance(sum(len(completion.token_ids) for completion in output.outputs), is_error=finished.is_error)

    def _write_manifest(self, section: Mapping[str, Any]) -> None:
        manifest = {**self._section, **section}
        if self._old is not None:
            self._changes += self._refuse_changes(section)
            if not self._changes:
                return
            log.warning("the environment differs from the one the job was begun in: %s", ", ".join(key for key, _, _ in self._changes))
            manifest["environment_changes"] = [*self._old.get("environment_changes", ()),
                                               {"num_rows_done": self._ledger.num_done, "changes": self._changes}]
        self._folder.write_manifest(manifest)

    def _refuse_changes(self, section: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        return refuse_changes(self._old, section, output=self._job.output, is_environment_free=self._job.allow_environment_change)


def _llm_class() -> Callable[..., Any]:
    from tpllm.llm import LLM  # loads jax, which a job that is refused early does not need
    return LLM
