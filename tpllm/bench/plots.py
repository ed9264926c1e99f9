"""Pictures of the slots over time, by matplotlib, which is an extra."""
import pathlib
from collections.abc import Mapping
from typing import Any

from tpllm.bench.command import check_writable
from tpllm.errors import ConfigError

FORMATS = ("png", "svg", "pdf")
COLORS = ("#0b6e99", "#c4501b")


def check_plot(path: str) -> None:
    """Refuse a picture that could not be drawn or written, before anything is measured.

    Raises:
        ConfigError: matplotlib is missing, the format is none of its own, or the file cannot be written.
    """
    check_writable(path)
    if pathlib.Path(path).suffix.removeprefix(".").lower() not in FORMATS:
        raise ConfigError(f"--plot is {path}; its name must end in one of {', '.join('.' + name for name in FORMATS)}")
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
    for panel, (name, curve), color in zip(panels, curves.items(), COLORS * len(curves), strict=False):
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
