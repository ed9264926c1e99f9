"""The report for a terminal."""
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.bars import ceiling
from benchmarks.gpu.contests import CONTESTS

Report = Mapping[str, Any]
WIDTH = 150


def print_report(report: Report, console: Console | None = None) -> None:
    """Print every section, the bars, and what was not run."""
    console = Console(width=WIDTH) if console is None else console
    machine = report["machine"]
    console.print(f"{machine.get('device_kind', 'no device')}, {machine.get('date', '')}, jax {machine.get('jax', '-')}, "
                  f"{', '.join(f'{name} {value}' for name, value in report['setup'].get('packages', {}).items())}", highlight=False)
    for name, section in report["sections"].items():
        if section.get("error"):
            console.print(f"{name}: FAILED: {section['error']}", style="red", highlight=False, markup=False)
        if section.get("entries") or section.get("best"):
            PRINTERS[name](report, section, console)
        for what in section.get("not_run", ()):
            console.print(f"{name}: not run: {what}", highlight=False, markup=False)
    _print_bars(report, console)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, text in enumerate(headings):
        table.add_column(text, justify="right" if index else "left")
    return table


def _print_correctness(report: Report, section: Report, console: Console) -> None:
    entries = section.get("entries", [])
    counts = {text: sum(entry["is_right"] is value for entry in entries) for text, value in (("right", True), ("wrong", False), ("refused", None))}
    console.print(f"correctness: {', '.join(f'{count} {text}' for text, count in counts.items())}", highlight=False)
    for entry in entries:
        if entry["is_right"] is False:
            said = entry.get("error") or entry.get("absent") or f"errors {entry['errors']}, at most {entry['bound']}"
            case = entry.get("case", entry.get("index"))
            console.print(f"  WRONG {entry['op']} {entry['implementation']} {case}: {said}", style="red", markup=False)


def _print_ceilings(report: Report, section: Report, console: Console) -> None:
    table = _table("ceilings, medians", "", "jax", "torch", "best")
    for name, best in section.get("best", {}).items():
        cells = [_ceiling_cell(section.get(side, {}).get(name), name) for side in ("jax", "torch")]
        table.add_row(name, *cells, _rate(best, name))
    console.print(table)


def _ceiling_cell(found: Any, name: str) -> str:
    samples = found.get("copy_bytes_per_s") if isinstance(found, Mapping) else found
    if not samples:
        return _why(found or {})
    return _rate(sorted(samples)[len(samples) // 2], name)


def _rate(value: float | None, name: str) -> str:
    return "-" if value is None else f"{value / 1e9:,.0f} GB/s" if name == "copy" else f"{value / 1e12:,.1f} TFLOP/s"


def _print_contests(report: Report, section: Report, console: Console) -> None:
    for contest in section.get("entries", []):
        best = min((side["seconds"] for side in contest["sides"].values() if "seconds" in side), default=None)
        table = _table(contest["name"], "side", "us", "over the best", "GB/s", "of copy", "TFLOP/s", "of bf16's", "")
        for label, side in contest["sides"].items():
            if "seconds" not in side:
                table.add_row(label, "-", "", "", "", "", "", _short(side.get("absent") or f"error: {side.get('error')}"))
                continue
            table.add_row(label, f"{1e6 * side['seconds']:,.1f}", f"{side['seconds'] / best:.2f}", f"{side['bytes_per_s'] / 1e9:,.0f}",
                          _share(side["bytes_per_s"], ceiling(report, "copy")), f"{side['flops_per_s'] / 1e12:,.1f}",
                          _share(side["flops_per_s"], ceiling(report, "bfloat16")), _remark(side))
        console.print(table)


def _remark(side: Report) -> str:
    if side.get("is_right") is False:
        return f"WRONG: off by {side['error_of_result']:.3f}"
    return _short("; ".join(side.get("log", [])) or side.get("note", ""))


def _print_models(report: Report, section: Report, console: Console) -> None:
    headings = ("weights", "work", "tokens/s", "ms a step, or to the first token", "GB/s or TFLOP/s", "of the ceiling")
    table = _table("end to end, random weights", *headings)
    for entry in section.get("entries", []):
        name = entry["quantization"] or "bfloat16"
        if "error" in entry or "absent" in entry:
            table.add_row(name, _why(entry), "", "", "", "")
        for row in entry["decode"]:
            if not row.get("step_s"):
                table.add_row(name, f"decode of {row['batch_size']}", _why(row, "too short to measure"), "", "", "")
                continue
            table.add_row(name, f"decode of {row['batch_size']}", f"{row['decode_tokens_per_s']:,.1f}", f"{1e3 * row['step_s']:.2f}",
                          f"{row['bytes_per_s'] / 1e9:,.0f} GB/s", _share(row["bytes_per_s"], ceiling(report, "copy")))
        for row in entry["prefill"]:
            if "ttft_s" not in row:
                table.add_row(name, f"prefill of {row['prompt_len']}", _why(row), "", "", "")
                continue
            table.add_row(name, f"prefill of {row['prompt_len']}", f"{row['prefill_tokens_per_s']:,.0f}", f"{1e3 * row['ttft_s']:.1f}",
                          f"{row['flops_per_s'] / 1e12:,.1f} TFLOP/s", _share(row["flops_per_s"], ceiling(report, "bfloat16")))
    console.print(table)


def _print_transformers(report: Report, section: Report, console: Console) -> None:
    title = f"transformers, static cache, bfloat16, {section['model'].get('step', 'no step')}"
    table = _table(title, "rows", "tokens/s", "ms a step", "ms to the first token", "ours")
    for entry in section.get("entries", []):
        if "step_s" not in entry:
            table.add_row(str(entry["batch_size"]), _why(entry), "", "", "")
            continue
        table.add_row(str(entry["batch_size"]), f"{entry['decode_tokens_per_s']:,.1f}", f"{1e3 * entry['step_s']:.2f}",
                      f"{1e3 * entry['ttft_s']:.1f}", _ours_beside(report, entry))
    console.print(table)


def _ours_beside(report: Report, entry: Report) -> str:
    models = report["sections"].get("end_to_end", {}).get("entries", [])
    speeds = [row["decode_tokens_per_s"] for model in models if model["quantization"] is None for row in model["decode"]
              if row.get("batch_size") == entry["batch_size"] and row.get("decode_tokens_per_s")]
    return f"{speeds[0]:,.1f} tokens/s, {speeds[0] / entry['decode_tokens_per_s']:.2f} times" if speeds else "-"


def _print_plan(report: Report, section: Report, console: Console) -> None:
    table = _table("tpllm plan beside the measured", "weights", "rows", "planned tokens/s", "measured", "error")
    for entry in section.get("entries", []):
        planned, error = entry["planned_tokens_per_s"], entry["error_of_tokens_per_s"]
        table.add_row(entry["quantization"] or "bfloat16", str(entry["batch_size"]), "-" if planned is None else f"{planned:,.0f}",
                      f"{entry['measured_tokens_per_s']:,.0f}", "this device's speeds are not known" if error is None else f"{error:+.0%}")
    console.print(table)


def _print_bars(report: Report, console: Console) -> None:
    table = _table("bars" + (", which tiny shapes on a CPU cannot reach or miss" if report["setup"]["is_tiny"] else ""), "", "value", "bar", "")
    for bar in report.get("bars", []):
        asked = f">= {bar['at_least']:.2f}" if bar["at_least"] is not None else f"<= {bar['at_most']:.2f}"
        verdict = {True: "reached", False: "MISSED", None: "not measured"}[None if report["setup"]["is_tiny"] else bar["is_reached"]]
        table.add_row(bar["what"], "-" if bar["value"] is None else f"{bar['value']:.2f}", asked, verdict)
    console.print(table)


def _share(value: float, of: float | None) -> str:
    return "-" if not of else f"{value / of:.0%}"


def _why(entry: Report, otherwise: str = "-") -> str:
    """Why an entry has no figures."""
    return _short(entry.get("error") or entry.get("absent") or otherwise)


def _short(text: str, limit: int = 60) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= limit else f"{text[:limit - 3]}..."


PRINTERS: dict[str, Callable[[Report, Report, Console], None]] = {
    "correctness": _print_correctness, "ceilings": _print_ceilings, "end_to_end": _print_models, "transformers": _print_transformers,
    "plan": _print_plan, **dict.fromkeys(CONTESTS, _print_contests)}
