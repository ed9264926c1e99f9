"""Throughput of a workload of mixed lengths: continuous batching beside static batching with the same kernels and the same number of slots.

  tpllm bench throughput --shape llama-160m --json out.json --plot out.png

All requests are there from the start; outputs are greedy and go past the end-of-sequence token, so that lengths are exact. Static batching fills
the slots only when the last of them is free. The gain that the lengths allow is computed: both kinds of batching are replayed, and their
decode steps and prompt tokens multiplied by what these were measured to cost. Numbers are medians of the runs, which take turns.
"""
import argparse
import contextlib
import dataclasses
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from tpllm.bench.batching import BatchRun, MeasuredCosts, measure_costs, run_continuous, run_static
from tpllm.bench.command import at_least, check_plot, measure_and_report, plot_occupancy
from tpllm.bench.machine import describe_machine
from tpllm.bench.subject import add_length_arguments, add_subject_arguments, lengths_of, open_subject, subject_entry, title
from tpllm.bench.workload import Item, make_workload, replay

KINDS = {"continuous": run_continuous, "static": run_static}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's arguments."""
    add_subject_arguments(parser)
    add_length_arguments(parser, num_requests=256)
    parser.add_argument("--runs", type=at_least(1), default=1, metavar="N", help="of each kind, in turns (default 1)")
    parser.add_argument("--json", metavar="FILE", help="write the result there too")
    parser.add_argument("--plot", metavar="FILE", help="draw the occupancy of both kinds over time there (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write JSON and picture; returns the exit code."""
    if args.plot:
        check_plot(args.plot)
    return measure_and_report(args, measure, lambda report: _show(report, args.plot))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The result of the arguments' benchmark; JSON-able."""
    lengths, machine = lengths_of(args), describe_machine(jax.local_devices()[0])
    with contextlib.closing(open_subject(args, max_model_len=lengths.context_len, max_num_seqs=args.max_num_seqs)) as llm:
        items = make_workload(llm.config.vocab_size, lengths)
        setup = {**subject_entry(args, llm), **dataclasses.asdict(lengths), "num_runs": args.runs}
        costs = measure_costs(llm, items)
        runs: dict[str, list[BatchRun]] = {name: [] for name in KINDS}
        for _ in range(args.runs):
            for name, take in KINDS.items():
                runs[name].append(take(llm, items))
    results = {name: medians([one.numbers() for one in done]) for name, done in runs.items()}
    return {"benchmark": "throughput", "machine": machine, "setup": setup, "results": results,
            "gain": gain_entry(items, costs, results, num_slots=setup["max_num_seqs"]),
            "runs": {name: [one.numbers() for one in done] for name, done in runs.items()},
            "timelines": {name: done[-1].timeline.as_lists() for name, done in runs.items()}, "load_average_after": list(os.getloadavg())}


def medians(runs: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The median of every number; None where a run has none."""
    return {name: None if any(one[name] is None for one in runs) else statistics.median(one[name] for one in runs) for name in runs[0]}


def gain_entry(items: Sequence[Item], costs: MeasuredCosts | None, results: Mapping[str, Mapping[str, float]], *, num_slots: int) -> dict[str, Any]:
    """The measured gain of continuous batching beside the one that the lengths allow; JSON-able.

    Args:
        items: the workload.
        costs: of this engine's work; None where they could not be measured.
        results: seconds of both kinds.
        num_slots: rows at once.
    """
    steps = replay((item.output_len for item in items), num_slots)
    measured = results["static"]["seconds"] / results["continuous"]["seconds"]
    entry = {"measured": measured, "allowed": None, "share_of_allowed": None, "share_of_allowed_increase": None,
             "steps_alone_allow": steps.static.count / max(steps.continuous.count, 1), "replayed_steps": {}, "replayed_seconds": {},
             "costs": costs and dataclasses.asdict(costs)}
    prefill_s = costs and costs.prefill_token_s * sum(len(item.prompt_token_ids) for item in items)
    for name in KINDS:
        counted = getattr(steps, name)
        entry["replayed_steps"][name] = {"count": counted.count, "by_rows": list(counted.by_rows), "occupancy_until_empty": counted.occupancy}
        entry["replayed_seconds"][name] = costs and prefill_s + counted.seconds(costs.step_s)
    if costs:
        allowed = steps.allowed_gain(prefill_s=prefill_s, step_s=costs.step_s)
        entry |= {"allowed": allowed, "share_of_allowed": measured / allowed,
                  "share_of_allowed_increase": (measured - 1) / (allowed - 1) if allowed > 1 else None}
    return entry


def _show(report: dict[str, Any], plot: str | None) -> None:
    setup, results, gain = report["setup"], report["results"], report["gain"]
    table = Table(title=title(report), title_justify="left")
    for heading in (f"{setup['num_requests']} requests, medians of {setup['num_runs']} runs", *KINDS):
        table.add_column(heading, justify="right" if heading in KINDS else "left")
    for label, name, template in ROWS:
        table.add_row(label, *("-" if results[kind][name] is None else template.format(results[kind][name]) for kind in KINDS))
    Console(width=max(100, *map(len, title(report).splitlines()))).print(table)
    allowed = ("which is too short to compare with what the lengths allow" if gain["allowed"] is None else
               f"the lengths allow {gain['allowed']:.2f} times: {gain['share_of_allowed']:.0%} of it")
    print(f"continuous batching is {gain['measured']:.2f} times as fast as static batching; {allowed}")
    if plot:
        heading = f"{setup['model']}, {setup['num_requests']} requests of mixed lengths, {setup['max_num_seqs']} slots"
        plot_occupancy(plot, report["timelines"], num_slots=setup["max_num_seqs"], heading=heading)
        print(f"occupancy drawn in {plot}")


ROWS = (
    ("requests/s", "requests_per_s", "{:.2f}"), ("output tokens/s", "output_tokens_per_s", "{:.1f}"),
    ("total tokens/s", "total_tokens_per_s", "{:.1f}"), ("seconds", "seconds", "{:.2f}"),
    ("slots busy until the queue is empty", "slot_occupancy", "{:.1%}"), ("tokens for each slot and step", "tokens_per_step_and_slot", "{:.3f}"),
    ("programs", "num_programs", "{:.0f}"), ("decode steps", "num_decode_steps", "{:.0f}"),
    ("host at work, of the time", "host_share", "{:.1%}"), ("host at work, for each program", "host_ms_per_program", "{:.2f} ms"),
    ("host waits for the device, of the time", "waited_share", "{:.1%}"),
)
