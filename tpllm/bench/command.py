"""What the benchmarks' commands have in common: numbers read from options, a result that is written and shown, and pictures of slots over time."""
import argparse
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from tpllm.errors import ConfigError

PLOT_FORMATS = ("png", "svg", "pdf")
PLOT_COLORS = ("#0b6e99", "#c4501b")


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


def check_plot(path: str) -> None:
    """Refuse a picture that could not be drawn or written, before anything is measured.

    Raises:
        ConfigError: matplotlib is missing, the format is none of its own, or the file cannot be written.
    """
    check_writable(path)
    if pathlib.Path(path).suffix.removeprefix(".").lower() not in PLOT_FORMATS:
        raise ConfigError(f"--plot is {path}; its name must end in one of {', '.join('.' + name for name in PLOT_FORMATS)}")
    _figure_class()


def plot_occupancy(path: str, curves: Mapping[str, Mapping[str, Any]], *, num_slots: int, heading: str) -> None:
    """Busy slots over time, one panel a curve on one time axis, with the waiting requests behind them.

    Args:
        path: the file; its ending chooses the format.
        curves: by name, each with ``times_s``, ``busy`` and ``waiting``.
        num_slots: the top of the axis.
        heading: above all.
    """
    figure = _figure_class()(figsize=(9, 1 + 1.9 * len(curves)), layout="constrained")
    panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (name, curve), color in zip(panels, curves.items(), PLOT_COLORS * len(curves), strict=False):
        panel.fill_between(curve["times_s"], curve["busy"], step="post", color=color, alpha=0.35, linewidth=0)
        panel.step(curve["times_s"], curve["busy"], where="post", color=color, linewidth=0.8)
        panel.set(title=name, ylabel="busy slots", ylim=(0, num_slots * 1.05))
        panel.title.set_size("medium")
        queue = panel.twinx()
        queue.step(curve["times_s"], curve["waiting"], where="post", color="black", linewidth=0.8, linestyle="--")
        queue.set(ylabel="waiting (dashed)", ylim=(0, max(*curve["waiting"], 1) * 1.05))
    panels[-1].set_xlabel("seconds")
    panels[-1].set_xlim(0, None)
    figure.suptitle(heading, fontsize="medium")
    figure.savefig(path, dpi=120)


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib, which is not installed; use: pip install 'tpllm[plot]'") from None
    return Figure
