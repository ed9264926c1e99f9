"""Run a batch job, or go on with one that was interrupted.

Any key of the job file can be set on the command line, after the file:
  tpllm run JOB.yaml --sampling.max-tokens 32 --output out/other

Try it without writing anything, or share it between machines:
  tpllm run JOB.yaml --dry-run
  tpllm run JOB.yaml --shard 0/4        the first of four; then: tpllm job merge OUTPUT

Paths in the file are relative to the working directory. A job that is stopped, even by kill -9 or a loss of power, goes on where it was
when the same command is given again.
"""
import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpllm.jobs.config import JobConfig

DRY_RUN = "--dry-run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(DRY_RUN, action="store_true",
                        help="check everything, count rows and tokens, estimate the time, and write nothing; may also stand after the file")
    parser.add_argument("--shard", metavar="I/N", help="run only the I-th of N shards, counted from 0; may also stand after the file")
    parser.add_argument("job", metavar="JOB.yaml", help="the job file")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--KEY VALUE", help="set a key of the job file, as in --model demo")


def run(args: argparse.Namespace, *, make_llm: Callable[..., Any] | None) -> int:
    """Run the command; returns the exit code."""
    from tpllm.jobs.config import load_job
    overrides = [word for word in args.overrides if word != DRY_RUN]
    is_dry_run = args.dry_run or len(overrides) < len(args.overrides)
    job = load_job(args.job, (["--shard", args.shard] if args.shard else []) + overrides)
    return _show_dry_run(job, make_llm) if is_dry_run else _run(job, make_llm)


def _run(job: "JobConfig", make_llm: Callable[..., Any] | None) -> int:
    from tpllm.jobs.runner import run_job
    from tpllm.jobs.signals import StopRequested
    try:
        result = run_job(job, make_llm=make_llm)
    except StopRequested as stop:
        return 128 + stop.number
    if result.signal is not None and not result.is_complete:
        print(f"tpllm: stopped with {result.num_done} of {result.num_rows} rows finished; give the same command again to go on", file=sys.stderr)
        return 128 + result.signal
    new = f"{result.num_new} new" if result.num_new else "nothing was left to do"
    failed = f"; {result.num_errors} failed: see {result.output}/part-*.errors.jsonl" if result.num_errors else ""
    print(f"tpllm: complete: {result.num_rows} rows in {result.output} ({new}){failed}", file=sys.stderr)
    if job.shard is not None:
        print(f"tpllm: shard {job.own_shard} is complete; when all are: tpllm job merge {job.output}", file=sys.stderr)
    return 0


def _show_dry_run(job: "JobConfig", make_llm: Callable[..., Any] | None) -> int:
    from tpllm.jobs.dry_run.run import dry_run
    from tpllm.jobs.dry_run.text import describe
    print("\n".join(describe(dry_run(job, make_llm=make_llm))))
    return 0
