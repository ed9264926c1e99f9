"""Delete downloaded models: fetched ones, and all revisions of a hub id in the hub's cache.

'tpllm list' shows their names. Models inside tpllm, and folders and files outside of the caches, are not deleted.
"""
import argparse
from collections.abc import Callable
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a name in 'tpllm list': a hub id 'owner/name', or 'smollm2'")


def run(args: argparse.Namespace, *, make_llm: Callable[..., Any] | None) -> int:
    """Run the command; returns the exit code."""
    from rich.filesize import decimal

    from tpllm.checkpoint.cached import remove_model
    for model in args.models:
        print(f"{model}: {decimal(remove_model(model))} freed", flush=True)
    return 0
