"""What users of a service would wait for: requests of mixed lengths that arrive at random times, in real time.

  tpllm bench serve-sim --shape llama-160m --rate 1 2 3 --json out.json --plot out.png
  tpllm bench serve-sim --shape llama-160m --long-prompt 1900
  tpllm bench serve-sim --shape llama-160m --shared-prefix 400

Arrivals are a Poisson process; every token is handed over as soon as the engine has it. Tokens that come together share the time before them
(inter-token), and that time itself stands beside it (between deliveries). Goodput counts the requests whose first token and whose mean time for
each further token came within --ttft-limit and --token-limit. --long-prompt lets a long prompt come among --max-num-seqs rows that decode;
--shared-prefix lets --num-requests prompts begin alike.
"""
import argparse
import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from tpllm.bench.command import above_zero, at_least, check_plot, measure_and_report, plot_occupancy
from tpllm.bench.machine import describe_machine
from tpllm.bench.neighbours import measure_long_prompt, measure_shared_prefix
from tpllm.bench.serving import PERCENTILES, serve
from tpllm.bench.subject import add_length_arguments, add_subject_arguments, lengths_of, open_subject, subject_entry, title
from tpllm.bench.workload import make_workload
from tpllm.engine.shapes import DEFAULT_SEQS, DEFAULT_SEQS_CPU
from tpllm.errors import ConfigError
from tpllm.llm import LLM

DEFAULT_RATE = 1.0
LATENCIES = {"ttft_s": "time to first token", "inter_token_s": "inter-token", "delivery_gap_s": "between deliveries", "end_to_end_s": "end to end"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's arguments."""
    add_subject_arguments(parser)
    add_length_arguments(parser, num_requests=64)
    parser.add_argument("--rate", type=above_zero, nargs="+", metavar="X",
                        help=f"mean arrivals a second, one or several (default {DEFAULT_RATE:g}, or none beside the next two)")
    parser.add_argument("--long-prompt", type=at_least(1), metavar="N", help="tokens of a prompt that comes among rows that decode")
    parser.add_argument("--shared-prefix", type=at_least(1), metavar="N", help="tokens that prompts share, to see what is saved")
    parser.add_argument("--suffix-len", type=at_least(1), default=16, metavar="N", help="tokens that each of them has of its own (default 16)")
    parser.add_argument("--runs", type=at_least(1), default=3, metavar="N", help="of --long-prompt and --shared-prefix (default 3)")
    parser.add_argument("--ttft-limit", type=above_zero, default=1.0, metavar="S", help="seconds to a first token that is in time (default 1)")
    parser.add_argument("--token-limit", type=above_zero, default=0.1, metavar="S",
                        help="mean seconds to each further token that are in time (default 0.1)")
    parser.add_argument("--json", metavar="FILE", help="write the result there too")
    parser.add_argument("--plot", metavar="FILE", help="draw busy slots and waiting requests over time there (needs --rate and matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write JSON and picture; returns the exit code."""
    if args.rate is None and not (args.long_prompt or args.shared_prefix):
        args.rate = [DEFAULT_RATE]
    if args.plot:
        if not args.rate:
            raise ConfigError("--plot draws arrivals; give --rate too")
        check_plot(args.plot)
    return measure_and_report(args, measure, lambda report: _show(report, args.plot))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The result of the arguments' benchmark; JSON-able."""
    machine = describe_machine(jax.local_devices()[0])
    report = {"benchmark": "serve-sim", "machine": machine, "setup": {}, "rates": {}, "long_prompt": None, "shared_prefix": None}
    if args.rate:
        with _opened(args, lengths_of(args).context_len, report) as llm:
            report["setup"] |= {**dataclasses.asdict(lengths_of(args)), "rate": args.rate, "ttft_limit": args.ttft_limit,
                                "token_limit": args.token_limit}
            for rate in args.rate:
                items = make_workload(llm.config.vocab_size, lengths_of(args, rate=rate))
                report["rates"][f"{rate:g}"] = serve(llm, items, ttft_limit=args.ttft_limit, token_limit=args.token_limit)
    if args.long_prompt:
        with _opened(args, None, report, num_more=1) as llm:
            report["long_prompt"] = measure_long_prompt(llm, args.long_prompt, num_runs=args.runs, seed=args.seed)
    if args.shared_prefix:
        with _opened(args, args.shared_prefix + args.suffix_len + 2, report) as llm:
            report["shared_prefix"] = measure_shared_prefix(llm, args.shared_prefix, num_requests=args.num_requests, suffix_len=args.suffix_len,
                                                            num_runs=args.runs, seed=args.seed)
    return {**report, "load_average_after": list(os.getloadavg())}


@contextlib.contextmanager
def _opened(args: argparse.Namespace, max_model_len: int | None, report: dict[str, Any], *, num_more: int = 0) -> Iterator[LLM]:
    """The options' model with so many slots more; the report gets its description, with the slots and the context asked for first."""
    default = DEFAULT_SEQS_CPU if jax.local_devices()[0].platform == "cpu" else DEFAULT_SEQS
    with contextlib.closing(open_subject(args, max_model_len=max_model_len, max_num_seqs=(args.max_num_seqs or default) + num_more)) as llm:
        entry = subject_entry(args, llm)
        report["setup"] = {**entry, "max_num_seqs": entry["max_num_seqs"] - num_more} | report["setup"]
        yield llm


def _show(report: dict[str, Any], plot: str | None) -> None:
    setup, rates = report["setup"], report["rates"]
    console = Console(width=max(100, *map(len, title(report).splitlines())))
    console.print(title(report), highlight=False)
    if rates:
        table = Table(title=f"{setup['num_requests']} requests of mixed lengths", title_justify="left")
        for heading in ("", *(f"{rate} requests/s" for rate in rates)):
            table.add_column(heading, justify="right" if heading else "left")
        for name, label in LATENCIES.items():
            for rank in PERCENTILES:
                table.add_row(f"{label}, p{rank}", *(_milliseconds(entry[name][f"p{rank}"]) for entry in rates.values()))
        for label, name, template in ROWS:
            table.add_row(label, *(template.format(entry[name]) for entry in rates.values()))
        console.print(table)
    for text in (_long_prompt_text(report["long_prompt"]), _shared_prefix_text(report["shared_prefix"])):
        if text:
            console.print(text, highlight=False)
    if plot:
        curves = {f"{rate} requests/s": entry["timeline"] for rate, entry in rates.items()}
        plot_occupancy(plot, curves, num_slots=setup["max_num_seqs"], heading=f"{setup['model']}, arrivals at random times")
        console.print(f"busy slots and waiting requests drawn in {plot}", highlight=False)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"


def _long_prompt_text(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    medians = entry["medians"]
    lines = [f"a prompt of {entry['prompt_len']} tokens among {entry['num_rows']} rows that decode; medians of {entry['num_runs']} runs:"]
    for name, label in (("inter_token", "inter-token"), ("delivery_gap", "between deliveries")):
        lines.append(f"  their {label} p99: {_milliseconds(medians[f'{name}_disturbed_p99_s'])}, "
                     f"{medians[f'{name}_p99_ratio']:.2f} times the undisturbed {_milliseconds(medians[f'{name}_undisturbed_p99_s'])}")
    lines.append(f"  its time to first token: {_milliseconds(medians['ttft_s'])}, {medians['ttft_ratio']:.2f} times that of running alone, "
                 f"{_milliseconds(medians['ttft_alone_s'])}")
    return "\n".join(lines)


def _shared_prefix_text(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    return (f"{entry['num_requests']} prompts of {entry['prefix_len']} tokens that they share and {entry['suffix_len']} of their own:\n"
            f"  prefill work saved: {entry['prefill_work_saved']:.1%}; {entry['num_prefilled_tokens']} of {entry['num_prompt_tokens']} tokens were "
            "computed\n"
            f"  time to first token of a hit: {_milliseconds(entry['ttft_hit_s'])}, {entry['ttft_ratio']:.2f} times that of a miss, "
            f"{_milliseconds(entry['ttft_miss_s'])}")


ROWS = (
    ("requests/s served", "requests_per_s", "{:.2f}"), ("goodput, requests/s", "goodput_requests_per_s", "{:.2f}"),
    ("of the requests in time", "good_share", "{:.0%}"), ("output tokens/s", "output_tokens_per_s", "{:.1f}"),
    ("waiting requests, mean", "mean_waiting", "{:.2f}"), ("waiting requests, most", "max_waiting", "{:d}"),
    ("slots busy", "slot_occupancy", "{:.1%}"), ("host at work, of the time", "host_share", "{:.1%}"),
)
