"""Time to first token, prefill and decode speed, load time and memory of a model, or of random weights of a known shape.

  tpllm bench latency --shape tinyllama-1.1b --json out/latency.json

Each run generates one token, then --output-len tokens, from new random prompts, greedily and past the end-of-sequence token. Prefill speed
is that of the first call; decode speed is that of the second call's further tokens over the time it takes beyond the first call. Numbers
are medians of the runs. Beside them stands how fast this machine reads memory, measured before and after: decoding one row can be no
faster than reading the weights and the valid part of the KV cache.
"""
import argparse
import contextlib
import dataclasses
import time
from typing import Any

import jax

from tpllm.bench.bandwidth import Bandwidth, device_bandwidth, host_bandwidth
from tpllm.bench.command import at_least, measure_and_report
from tpllm.bench.machine import describe_machine, peak_device_bytes, peak_host_bytes
from tpllm.bench.report import bandwidth_entry, decode_reads, print_table
from tpllm.bench.shapes import find_shape
from tpllm.bench.subject import add_model_arguments, make_llm, model_entry
from tpllm.bench.timing import RunTimes, Speeds, Workload
from tpllm.bench.traffic import Traffic, decode_traffic
from tpllm.environment.memory import host_free_bytes
from tpllm.llm import LLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's arguments."""
    add_model_arguments(parser)
    parser.add_argument("--prompt-len", type=at_least(1), default=128, metavar="N", help="tokens of each prompt (default 128)")
    parser.add_argument("--output-len", type=at_least(2), default=32, metavar="N", help="tokens to generate for each (default 32)")
    parser.add_argument("--batch-size", type=at_least(1), default=1, metavar="N", help="prompts computed together (default 1)")
    parser.add_argument("--runs", type=at_least(1), default=3, metavar="N", help="measured runs (default 3)")
    parser.add_argument("--warmup", type=at_least(0), default=1, metavar="N", help="runs before them that do not count (default 1)")
    parser.add_argument("--json", metavar="FILE", help="write the result there too")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON; returns the exit code."""
    return measure_and_report(args, measure, print_table)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The result of the arguments' benchmark; JSON-able."""
    if args.shape:
        find_shape(args.shape)
    is_on_host = jax.local_devices()[0].platform == "cpu"
    machine = describe_machine(jax.local_devices()[0])
    # A buffer on an accelerator would count in its peak memory, so there bandwidth is measured afterwards only.
    before = host_bandwidth(host_free_bytes()) if is_on_host else Bandwidth(())
    start = time.perf_counter()
    llm = make_llm(args, max_model_len=args.prompt_len + args.output_len, max_num_seqs=args.batch_size)
    jax.block_until_ready(llm.params)
    with contextlib.closing(llm):
        load_s = time.perf_counter() - start
        devices, setup = llm.config.partition.mesh.local_devices, _setup(args, llm)
        warm_up_s, runs, speeds, traffic = _measure_llm(llm, args)
        results = {**dataclasses.asdict(speeds), "inter_token_ms": speeds.step_s and speeds.step_s * 1e3, "load_s": load_s,
                   "warm_up_s": warm_up_s, "peak_host_bytes": peak_host_bytes(), "peak_device_bytes": peak_device_bytes(devices)}
    after = host_bandwidth(host_free_bytes()) if is_on_host else device_bandwidth(devices)
    measured = "host memory, one thread a core" if is_on_host else f"memory of {len(devices)} devices"
    return {"benchmark": "latency", "machine": machine, "setup": setup, "results": results, "runs_s": [dataclasses.asdict(run) for run in runs],
            "decode_reads": decode_reads(traffic, speeds, before + after), "bandwidth": bandwidth_entry(before + after, measured)}


def _setup(args: argparse.Namespace, llm: LLM) -> dict[str, Any]:
    return {**model_entry(args, llm), "prompt_len": args.prompt_len, "output_len": args.output_len, "batch_size": args.batch_size,
            "num_runs": args.runs, "num_warmup": args.warmup}


def _measure_llm(llm: LLM, args: argparse.Namespace) -> tuple[float, list[RunTimes], Speeds, Traffic]:
    """(seconds of compiling, the runs, their medians, what a decode step reads)."""
    start = time.perf_counter()
    llm.warm_up()
    warm_up_s = time.perf_counter() - start
    lengths = {"batch_size": args.batch_size, "prompt_len": args.prompt_len, "output_len": args.output_len}
    workload = Workload(llm.config.vocab_size, **lengths)
    for _ in range(args.warmup):
        workload.time_run(llm)
    runs = [workload.time_run(llm) for _ in range(args.runs)]
    traffic = decode_traffic(llm.config, llm.params, kv_dtype=llm.fingerprint()["kv_cache_dtype"], **lengths)
    return warm_up_s, runs, workload.speeds(runs), traffic
