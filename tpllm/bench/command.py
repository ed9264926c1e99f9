"""What the benchmarks' commands have in common: numbers read from options, and a result that is written and shown."""
import argparse
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from tpllm.errors import ConfigError


def measure_and_report(args: argparse.Namespace, measure: Callable[[argparse.Namespace], dict[str, Any]],
                       print_table: Callable[[dict[str, Any]], None]) -> int:
    """Run a benchmark, write its JSON where ``args.json`` asks for it, print its table; returns the exit code."""
    if args.json:
        check_writable(args.json)
    report = measure(args)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    print_table(report)
    return 0


def at_least(low: int) -> Callable[[str], int]:
    """A reader of whole numbers of at least ``low`` for argparse."""
    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is no whole number of at least {low}")
        return int(text)
    return whole_number


def above_zero(text: str) -> float:
    """Read a number above 0 for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value


def check_writable(path: str) -> None:
    """Refuse a result file that could not be written, before anything is measured.

    Raises:
        ConfigError: its folder is missing or read-only, or it is a folder.
    """
    target = pathlib.Path(path)
    if target.is_dir() or not target.parent.is_dir() or not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ConfigError(f"cannot write {path}; give a file in a folder that exists and is writable")
