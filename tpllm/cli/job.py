"""Look at a batch job, run its failed rows again, or put its shards together.

  tpllm job status out/first
  tpllm job retry out/first
  tpllm run JOB.yaml --shard 0/2        on one machine, and --shard 1/2 on another
  tpllm job merge out/first

Each of these has a help of its own, such as 'tpllm job retry --help'.
"""
import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tpllm.cli.help_text import HelpFormatter
from tpllm.cli.run import run_and_report

if TYPE_CHECKING:
    from tpllm.jobs.status import FolderStatus

STATUS_TEXT = """Show how far a job is: rows, parts, and whether a process runs it. It may be asked at any time, also while the job runs.

Rows and bytes of every part are compared with what the manifest tells of it, and with --verify its content. A part that is not what was
committed does not count, and is named.

The exit code is 0 whether or not the job is complete, and 2 where there is no job; --json has "is_complete" for scripts. With --verify it is 1
where a part, a journal or the manifest is damaged."""
EXIT_DAMAGED = 1
MERGE_TEXT = """Put the shards of a job together, into the folder that the job without shards would have made.

Everything is checked first: that the shards are of one job, all there, complete and not running. The shards' folders stay as they are; their
files get a second name where the file system has hard links, and are copied elsewhere. A merge that was interrupted is completed by the same
command, and so is one that is complete already."""
RETRY_TEXT = """Run the failed rows of a job again. Rows that succeeded are kept and never computed again; rows that an incomplete job has not run
yet are run too.

The folder's manifest tells what the job is. A row that succeeds now moves from the errors file to its place in the part; a row that fails again
stays in the errors file. A part's file stays where it is until the first of its rows is finished again. If the command is interrupted, at any moment,
run it again.

If the job ran in shards, give the folder of one shard, or the whole job's folder after the merge. The exit code is 1 if every row failed again."""
COLUMNS = ("", "rows", "failed", "in journals", "parts", "state")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare one subcommand for each thing that can be done."""
    commands = parser.add_subparsers(title="commands", metavar="NAME", required=True)
    status = commands.add_parser("status", help="show how far a job is", description=STATUS_TEXT, formatter_class=HelpFormatter, allow_abbrev=False)
    status.add_argument("output", metavar="OUTPUT", help="the job's output folder")
    status.add_argument("--tokens", action="store_true", help="also count prompt and completion tokens; parses every finished row")
    status.add_argument("--verify", action="store_true", help="also compare the content of every part with the hash that the manifest has of it")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run_job_command=_status)
    retry = commands.add_parser("retry", help="run the failed rows again", description=RETRY_TEXT, formatter_class=HelpFormatter, allow_abbrev=False)
    retry.add_argument("output", metavar="OUTPUT", help="the job's output folder")
    retry.add_argument("-i", "--input", metavar="INPUT", nargs="+", help="where the input is; by default where it was when the job began")
    retry.add_argument("--max-failures", metavar="N", type=int, help="stop with exit code 1 once more rows than this have failed again")
    retry.add_argument("--allow-environment-change", action="store_true",
                       help="go on under other versions, hardware, mesh or max_num_seqs than the job began with; recorded in the manifest")
    retry.set_defaults(run_job_command=_retry)
    merge = commands.add_parser("merge", help="put the shards of a job together", description=MERGE_TEXT, formatter_class=HelpFormatter,
                                allow_abbrev=False)
    merge.add_argument("output", metavar="OUTPUT", help="the output folder of the whole job; made if it is not there")
    merge.add_argument("shards", metavar="SHARD_FOLDER", nargs="*", help="the shards' folders; by default those below OUTPUT")
    merge.add_argument("--allow-environment-change", action="store_true",
                       help="put shards together that ran under other versions, hardware, mesh or max_num_seqs; recorded in the manifest")
    merge.set_defaults(run_job_command=_merge)


def run(args: argparse.Namespace, *, make_llm: Callable[..., Any] | None) -> int:
    """Run the command; returns the exit code."""
    return args.run_job_command(args, make_llm)


def _status(args: argparse.Namespace, _: Callable[..., Any] | None) -> int:
    from tpllm.jobs.status import job_status
    status = job_status(args.output, counts_tokens=args.tokens, verifies=args.verify)
    folders = ([status.whole] if status.whole else []) + status.shards
    exit_code = EXIT_DAMAGED if args.verify and any(folder.problems for folder in folders) else 0
    if args.json:
        print(json.dumps(status.as_json(), indent=1))
        return exit_code
    rows = [_row(_name(folder), folder) for folder in status.shards]
    rows += [(f"shard {shard}", "", "", "", "", "not begun") for shard in status.missing]
    rows.append(_row("together" if rows and status.whole is None else "job", status.together))
    if rows[1:] and status.whole is None:
        num_running = sum(shard.pid is not None for shard in status.shards)
        rows[-1] = (*rows[-1][:-1], "complete" if status.together.is_complete else f"{num_running} running" if num_running else "incomplete")
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for row in (COLUMNS, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if args.tokens:
        print(f"tokens: {status.together.prompt_tokens} in prompts, {status.together.completion_tokens} in completions")
    for folder in folders:
        for problem in folder.problems:
            print(f"{folder.folder}: {problem}")
    if args.verify and exit_code == 0:
        print(f"verified: {status.together.num_committed} parts are what was committed")
    if status.whole is None and status.together.is_complete:
        print(f"every shard is complete; put them together with: tpllm job merge {args.output}")
    return exit_code


def _name(folder: "FolderStatus") -> str:
    return f"shard {folder.parts.shard}" if folder.parts else folder.folder.rsplit("/", 1)[-1]


def _row(name: str, folder: "FolderStatus") -> tuple[str, ...]:
    """One line of the table."""
    num_rows, num_parts = (folder.parts.num_rows, len(folder.parts.numbers)) if folder.parts else ("?", "?")
    state = "complete" if folder.is_complete else "incomplete" if folder.pid is None else f"running (pid {folder.pid or '?'})"
    return name, f"{folder.num_done}/{num_rows}", str(folder.num_failed), str(folder.num_in_journals), f"{folder.num_committed}/{num_parts}", state


def _retry(args: argparse.Namespace, make_llm: Callable[..., Any] | None) -> int:
    from tpllm.jobs.config import make_job
    from tpllm.jobs.job_of_folder import read_job_folder
    options = {key: getattr(args, key) for key in ("input", "max_failures", "allow_environment_change")}
    job = make_job({**read_job_folder(args.output), **{key: value for key, value in options.items() if value is not None}}, name=args.output)
    return run_and_report(job, make_llm, retries_failed=True)


def _merge(args: argparse.Namespace, _: Callable[..., Any] | None) -> int:
    from tpllm.jobs.merge import merge_shards
    result = merge_shards(args.output, args.shards, allow_environment_change=args.allow_environment_change)
    new = f"{result.num_new} of {result.num_parts} parts new" if result.num_new else "nothing was left to do"
    failed = f"; {result.num_errors} failed: see {args.output}/part-*.errors.jsonl" if result.num_errors else ""
    print(f"tpllm: merged {result.num_shards} shards: {result.num_rows} rows in {args.output} ({new}){failed}", file=sys.stderr)
    return 0
