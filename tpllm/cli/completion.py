"""Print the script by which a shell completes tpllm's commands and options.

  eval "$(tpllm completion bash)"                               for this shell
  tpllm completion bash > ~/.local/share/bash-completion/completions/tpllm
  tpllm completion zsh > "${fpath[1]}/_tpllm"

Shells that are started afterwards read the files.
"""
import argparse
from collections.abc import Callable, Iterator
from typing import Any

FILES, FOLDERS = ("job",), ("model", "output", "shards")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    import shtab
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="the shell to print a script for")


def run(args: argparse.Namespace, *, make_llm: Callable[..., Any] | None) -> int:
    """Run the command; returns the exit code."""
    import shtab
    print(shtab.complete(completable_parser(), shell=args.shell))
    return 0


def completable_parser() -> argparse.ArgumentParser:
    """The parser of all commands, with what a shell can offer for each argument: files, folders, dtypes, and the keys of a job."""
    import shtab

    from tpllm.cli.bench import BenchParser
    from tpllm.cli.main import COMMANDS, make_parser
    parser = make_parser(COMMANDS)
    for command, subparser in _subparsers(parser):
        if isinstance(subparser, BenchParser):
            subparser.load(command)
        if command == "run":
            _add_job_keys(subparser)
        for action in subparser._actions:
            if action.dest in FILES:
                action.complete = shtab.FILE
            elif action.dest in FOLDERS:
                action.complete = shtab.DIRECTORY
            elif action.dest.endswith("dtype"):
                action.choices = DTYPES
    return parser


def _add_job_keys(parser: argparse.ArgumentParser) -> None:
    """What the command takes as free words, ``--sampling.max-tokens 32``, as options."""
    from tpllm.jobs.config import JOB_KEYS, SAMPLING_KEYS
    taken = {option for action in parser._actions for option in action.option_strings}
    keys = [key for key in JOB_KEYS if key not in ("engine", "sampling")] + [f"sampling.{key}" for key in SAMPLING_KEYS]
    for key in keys:
        if (option := "--" + key.replace("_", "-")) not in taken:
            parser.add_argument(option, dest=key)


def _subparsers(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, subparser in action.choices.items():
                yield name, subparser
                yield from _subparsers(subparser)
