"""One latency result, as JSON-able dict and as a table."""
import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from tpllm.bench.bandwidth import Bandwidth
from tpllm.bench.timing import Speeds
from tpllm.bench.traffic import Traffic


def decode_reads(traffic: Traffic, speeds: Speeds, bandwidth: Bandwidth) -> dict[str, Any]:
    """What decoding read, how fast, and which share of the measured bandwidth that is. JSON-able."""
    bytes_per_s = None if speeds.step_s is None else traffic.bytes_per_step / speeds.step_s
    return {**dataclasses.asdict(traffic), "bytes_per_step": traffic.bytes_per_step, "bytes_per_token": traffic.bytes_per_token,
            "bytes_per_s": bytes_per_s, "share_of_median_bandwidth": bytes_per_s and bytes_per_s / bandwidth.median,
            "share_of_best_bandwidth": bytes_per_s and bytes_per_s / bandwidth.best}


def bandwidth_entry(bandwidth: Bandwidth, measured: str) -> dict[str, Any]:
    """The samples, best and median, bytes per second. JSON-able.

    Args:
        bandwidth: of all samples.
        measured: what was read, for the reader.
    """
    return {"measured": measured, "best_bytes_per_s": bandwidth.best, "median_bytes_per_s": bandwidth.median,
            "samples_bytes_per_s": list(bandwidth.samples)}


def print_table(report: Mapping[str, Any]) -> None:
    """The result for people, on standard output."""
    table = Table(title=_title(report), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, value in _rows(report):
        table.add_row(label, value)
    Console(width=max(100, *map(len, _title(report).splitlines()))).print(table)


def _title(report: Mapping[str, Any]) -> str:
    setup, machine = report["setup"], report["machine"]
    load = ", ".join(f"{value:.1f}" for value in machine["load_average"])
    return (f"{setup['model']}{' (random weights)' if setup['has_random_weights'] else ''}, {setup['dtype']}, mesh {setup['mesh']} "
            f"({machine['platform']}), batch {setup['batch_size']}, prompt {setup['prompt_len']}, output {setup['output_len']}\n"
            f"{machine['cpu_model']}, {machine['num_cpus']} CPUs, load average {load} before; medians of {setup['num_runs']} runs")


def _rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    results, reads, bandwidth = report["results"], report["decode_reads"], report["bandwidth"]
    rows = [
        ("time to first token", f"{results['ttft_s'] * 1e3:.1f} ms"),
        ("prefill", f"{results['prefill_tokens_per_s']:.1f} tokens/s"),
        ("decode", _or_too_short(results["decode_tokens_per_s"], "{:.2f} tokens/s")),
        ("between tokens of a row", _or_too_short(results["inter_token_ms"], "{:.2f} ms")),
        ("load" if not report["setup"]["has_random_weights"] else "making random weights", f"{results['load_s']:.2f} s"),
        ("compiling, or reading the compile cache", f"{results['warm_up_s']:.2f} s"),
        ("peak memory of the process", f"{results['peak_host_bytes'] / 1e9:.2f} GB"),
        ("weights", f"{reads['weight_bytes'] / 1e9:.3f} GB"),
        ("read per decode step", f"{reads['weight_bytes_read'] / 1e9:.3f} GB of weights + {reads['kv_bytes_valid'] / 1e9:.3f} GB of KV cache"),
        ("decode reads", _or_too_short(reads["bytes_per_s"], "{:.1f} GB/s", scale=1e-9)),
        ("memory reads", f"{bandwidth['median_bytes_per_s'] / 1e9:.1f} GB/s median, {bandwidth['best_bytes_per_s'] / 1e9:.1f} best"),
        ("share of the median (best)", _or_too_short(reads["share_of_median_bandwidth"], "{:.0f} %", scale=100)
         + _or_too_short(reads["share_of_best_bandwidth"], " ({:.0f} %)", scale=100, otherwise="")),
    ]
    if results["peak_device_bytes"] is not None:
        rows.insert(7, ("peak memory of a device", f"{results['peak_device_bytes'] / 1e9:.2f} GB"))
    return rows


def _or_too_short(value: float | None, template: str, *, scale: float = 1.0, otherwise: str = "too short to measure: raise --output-len") -> str:
    return otherwise if value is None else template.format(value * scale)
