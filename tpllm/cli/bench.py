"""Measure speed and memory.

  latency   time to first token, decode and prefill speed, load time, peak memory; see tpllm bench latency --help
"""
import argparse
import importlib
from collections.abc import Callable
from typing import Any

BENCHES = {"latency": "tpllm.bench.latency"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; the benchmark declares its own."""
    parser.add_argument("bench", choices=BENCHES, metavar="NAME", help=f"which: {', '.join(BENCHES)}")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="OPTIONS", help="of the benchmark")


def run(args: argparse.Namespace, *, make_llm: Callable[..., Any] | None) -> int:
    """Run the command; returns the exit code."""
    from tpllm.cli.main import Parser
    bench = importlib.import_module(BENCHES[args.bench])
    parser = Parser(prog=f"tpllm bench {args.bench}", description=bench.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(args.rest)) or 0
