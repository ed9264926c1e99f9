"""Measure speed and memory of a model on this machine."""
import argparse
import importlib
from collections.abc import Callable
from typing import Any

from tpllm.cli.entry import raise_interrupts
from tpllm.cli.help_text import HelpFormatter, Parser

BENCHES = {"latency": "time to first token, decode and prefill speed, load time, peak memory",
           "throughput": "requests of mixed lengths by continuous batching, beside static batching",
           "serve-sim": "what users of a service wait for: requests that arrive at random times",
           "quality": "perplexity of every quantization beside the model as it is"}


class BenchParser(Parser):
    """A parser that gets its arguments when it is used: a benchmark's module loads jax."""

    def load(self, name: str) -> None:
        """Take description and arguments from the benchmark."""
        bench = importlib.import_module(f"tpllm.bench.{name.replace('-', '_')}")
        self.description = bench.__doc__
        self.set_defaults(run_bench=bench.run)
        bench.add_arguments(self)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's."""
        self.load(self.prog.split()[-1])
        return super().parse_known_args(args, namespace)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare one subcommand for each benchmark."""
    benches = parser.add_subparsers(title="benchmarks", metavar="NAME", required=True, parser_class=BenchParser)
    for name, text in BENCHES.items():
        benches.add_parser(name, help=text, formatter_class=HelpFormatter, allow_abbrev=False)


def run(args: argparse.Namespace, *, make_llm: Callable[..., Any] | None) -> int:
    """Run the command; returns the exit code."""
    raise_interrupts()
    return args.run_bench(args) or 0
