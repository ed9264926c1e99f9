"""Run a batch job: rows of prompts in, a folder of completions out.

  tpllm run -i prompts.jsonl -o out -m MODEL --max-tokens 64
  tpllm run -i table.csv -o out -m MODEL --prompt-template "Summarize: {text}"
  tpllm run JOB.yaml --max-tokens 32   a job file; options go before its keys
  tpllm run out                        the job of an output folder goes on

  tpllm run JOB.yaml --dry-run         try it without writing anything
  tpllm run JOB.yaml --shard 0/4       the first of four; then: tpllm job merge OUTPUT

A job that is stopped, even by kill -9 or a loss of power, goes on where it was when the same command is given again.

Any key of a job is an option, with a dot where it lies in another one, as in --engine.page-size 32. Relative paths, also those in a job file, begin
at the working directory. The exit code is 1 where every row failed, or more than --max-failures.
"""
import argparse
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tpllm.cli.help_text import MODEL_TEXT, attribute_texts
from tpllm.cli.model_options import ENGINE_OPTIONS, add_engine_options, add_sampling_options, sampling_of

if TYPE_CHECKING:
    from tpllm.jobs.config import JobConfig
    from tpllm.jobs.runner import JobResult

EXIT_ROWS_FAILED = 1
NOT_FOR_JOBS = ("seed", "output_kind")  # one seed for all rows would make equal prompts draw alike; a job's own seed gives each row another
FLAGS = {"input": ("-i", "--input"), "output": ("-o", "--output"), "model": ("-m", "--model")}
METAVARS = {"prompt_template": "TEXT", "shard": "I/N", "work_dir": "FOLDER", "output_format": "NAME", "limit": "N", "max_failures": "N",
            "rows_per_part": "N", "seed": "N"}
NUM_REASON_CHARACTERS = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments: the keys of a job, of its engine and of its sampling."""
    from tpllm.jobs.config import JobConfig
    parser.takes_keys = True
    parser.usage = "%(prog)s [JOB] [-i INPUT ... -o OUTPUT -m MODEL] [OPTIONS]"
    parser.add_argument("job", metavar="JOB", nargs="?", help="a job file (YAML), or the output folder of a job")
    parser.add_argument("--dry-run", action="store_true", help="check everything, count rows and tokens, estimate the time, and write nothing")
    group, texts = parser.add_argument_group("job"), attribute_texts(JobConfig) | {"model": MODEL_TEXT}
    for key in _job_keys():
        flags = FLAGS.get(key, ("--" + key.replace("_", "-"),))
        if key == "allow_environment_change":
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, default=None, help=texts[key])
        else:
            group.add_argument(*flags, metavar=METAVARS.get(key, key.upper()), help=texts[key], nargs="+" if key == "input" else None)
    add_engine_options(parser.add_argument_group("engine"))
    add_sampling_options(parser, max_tokens="until the context is full", leaves_out=NOT_FOR_JOBS)


def run(args: argparse.Namespace, *, make_llm: Callable[..., Any] | None) -> int:
    """Run the command; returns the exit code."""
    from tpllm.jobs.config import make_job, parse_overrides, read_job_file
    from tpllm.jobs.job_of_folder import read_job_folder
    options = parse_overrides(list(_words(args)))
    options += [(("sampling", key), value) for key, value in sampling_of(args, leaves_out=NOT_FOR_JOBS).items()]
    data = {} if args.job is None else read_job_folder(args.job) if os.path.isdir(args.job) else read_job_file(args.job)
    job = make_job(data, options + parse_overrides(args.keys), name=args.job or "")
    return _show_dry_run(job, make_llm) if args.dry_run else run_and_report(job, make_llm)


def run_and_report(job: "JobConfig", make_llm: Callable[..., Any] | None, *, retries_failed: bool = False) -> int:
    """Run a job to its end, and say on standard error what came of it.

    Args:
        job: what to run.
        make_llm: makes the engine; None for :class:`tpllm.LLM`.
        retries_failed: whether rows that failed before are run again.

    Returns:
        The exit code: 0, 1 where every row failed, or more than ``max_failures``, or 128 + n when stopped by signal n.
    """
    from tpllm.jobs.runner import run_job
    from tpllm.jobs.signals import StopRequested
    try:
        result = run_job(job, make_llm=make_llm, retries_failed=retries_failed)
    except StopRequested as stop:
        return 128 + stop.number
    if result.signal is not None and not result.is_complete:
        _say(f"stopped with {result.num_done} of {result.num_rows} rows finished; give the same command again to go on")
        return 128 + result.signal
    return _report(job, result, retries_failed=retries_failed)


def _report(job: "JobConfig", result: "JobResult", *, retries_failed: bool) -> int:
    """What came of a run that was not stopped by a signal; returns the exit code."""
    last = f"; the last: {result.last_failure[:NUM_REASON_CHARACTERS]}" if result.last_failure else ""
    num_failed = result.num_new_errors if retries_failed else result.num_errors
    too_many = f"{num_failed} row{'' if num_failed == 1 else 's'} failed, which is more than max_failures {job.max_failures}{last}"
    if result.has_too_many_failures and not result.is_complete:
        _say(f"stopped, because {too_many}; {result.num_done} of {result.num_rows} rows are finished and kept: give a larger --max-failures to go on")
        return EXIT_ROWS_FAILED
    new = f"{result.num_new} {'retried' if retries_failed else 'new'}" if result.num_new else "nothing was left to do"
    failed = f"; {result.num_errors} failed: see {result.output}/part-*.errors.jsonl" if result.num_errors else ""
    _say(f"complete: {result.num_rows} rows in {result.output} ({new}){failed}")
    if job.shard is not None:
        _say(f"shard {job.own_shard} is complete; when all are: tpllm job merge {job.output}")
    if result.has_too_many_failures:
        _say(too_many)
    elif result.has_only_failures or (retries_failed and result.num_new == result.num_new_errors > 0):
        _say(f"every row {'that was retried ' if not result.has_only_failures else ''}failed{last}")
    else:
        return 0
    return EXIT_ROWS_FAILED


def _say(text: str) -> None:
    print(f"tpllm: {text}", file=sys.stderr)


def _job_keys() -> list[str]:
    """The keys of a job that have options made here: not the mappings, and not what is the engine's."""
    from tpllm.jobs.config import JOB_KEYS
    return [key for key in JOB_KEYS if key not in ("engine", "sampling", *ENGINE_OPTIONS)]


def _words(args: argparse.Namespace) -> Iterator[str]:
    """The job's and the engine's options as words that set keys."""
    import json

    from tpllm.jobs.config import JOB_KEYS
    for key in (*_job_keys(), *ENGINE_OPTIONS):
        value = getattr(args, key)
        if value is not None:
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
            is_job_key = key in JOB_KEYS
            yield f"--{key if is_job_key else f'engine.{key}'}={value if is_job_key and isinstance(value, str) else json.dumps(value)}"


def _show_dry_run(job: "JobConfig", make_llm: Callable[..., Any] | None) -> int:
    from tpllm.jobs.dry_run.run import dry_run
    from tpllm.jobs.dry_run.text import describe
    print("\n".join(describe(dry_run(job, make_llm=make_llm))))
    return 0
