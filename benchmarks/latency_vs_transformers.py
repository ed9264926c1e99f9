"""Latency of tpllm beside transformers: one shape, float32, one row, random weights, both on every core of this machine's CPU.

  python benchmarks/latency_vs_transformers.py --shape tinyllama-1.1b

Both models live in one process and take turns: ours, theirs, ours, theirs. The memory's read bandwidth is measured before every turn of
ours and at the end; by then torch's threads, which spin for some 10 ms after their work, sleep (XLA's sleep at once). Ours is
`LLM.generate`, host work and sampling included. Theirs is given its best: the default attention (sdpa), inference mode, logits of the last
position only, and a plain greedy loop over the model and its own cache in place of `generate`. The result, medians and every pair, goes to
benchmarks/results/<date>-latency-<shape>-float32.json.
"""
import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import statistics
import time
from typing import Any

import jax
import torch
import transformers
from rich.console import Console
from rich.table import Table

from tpllm.bench.bandwidth import Bandwidth, host_bandwidth
from tpllm.bench.latency import at_least
from tpllm.bench.machine import describe_machine
from tpllm.bench.report import bandwidth_entry, decode_reads
from tpllm.bench.shapes import llm_of_shape
from tpllm.bench.timing import Speeds, Workload
from tpllm.bench.traffic import Traffic, decode_traffic
from tpllm.checkpoint.memory import host_free_bytes
from tpllm.model.config import ModelConfig

RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one turn of one side came to, tokens per second."""

    prefill: float
    decode: float


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write the result."""
    args = _parse(argv)
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(os.cpu_count())
    machine = {**describe_machine(jax.devices()[0]), "torch": torch.__version__, "transformers": transformers.__version__}
    report = {"benchmark": "latency beside transformers", "machine": machine, **_compare(args)}
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"{datetime.datetime.now(datetime.UTC).date()}-latency-{args.shape}-float32.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    _print_table(report)
    print(f"written to {path}")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tinyllama-1.1b", help="as for tpllm bench latency")
    parser.add_argument("--prompt-len", type=at_least(1), default=128)
    parser.add_argument("--output-len", type=at_least(2), default=33, help="the first comes with the prefill (default 33)")
    parser.add_argument("--pairs", type=at_least(1), default=5, help="turns of each side that count (default 5)")
    parser.add_argument("--warmup", type=at_least(0), default=1, help="turns before them (default 1)")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="the folder to write to")
    return parser.parse_args(argv)


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    lengths = {"batch_size": 1, "prompt_len": args.prompt_len, "output_len": args.output_len}
    llm = llm_of_shape(args.shape, mesh="tp=1", dtype="float32", max_model_len=args.prompt_len + args.output_len, max_num_seqs=1)
    with contextlib.closing(llm):
        llm.warm_up()
        traffic = decode_traffic(llm.config, llm.params, kv_dtype="float32", **lengths)
        workload = Workload(llm.config.vocab_size, **lengths)
        peer = make_peer(llm.config, context=args.prompt_len + args.output_len)
        for _ in range(args.warmup):
            workload.time_run(llm)
            time_peer(peer, args.prompt_len, args.output_len)
        bandwidths, runs, theirs = [], [], []
        for _ in range(args.pairs):
            bandwidths.append(host_bandwidth(host_free_bytes()))
            runs.append(workload.time_run(llm))
            theirs.append(time_peer(peer, args.prompt_len, args.output_len))
        bandwidths.append(host_bandwidth(host_free_bytes()))
    speeds = [workload.speeds([run]) for run in runs]
    setup = {"model": args.shape, "dtype": "float32", **lengths, "num_pairs": args.pairs, "num_threads": torch.get_num_threads(),
             "peer_attention": peer.config._attn_implementation}
    bandwidth = bandwidth_entry(sum(bandwidths, Bandwidth(())), "host memory, one thread a core; samples before each pair and at the end")
    return {"setup": setup, **summarize(speeds, theirs, traffic, bandwidths), "bandwidth": bandwidth}


def make_peer(config: ModelConfig, *, context: int) -> transformers.PreTrainedModel:
    """transformers' model of the same sizes, with its own random weights."""
    hf_config = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers, head_dim=config.head_dim,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads, intermediate_size=config.intermediate_size,
        max_position_embeddings=max(context, config.max_position), rms_norm_eps=config.norm_eps, tie_word_embeddings=config.ties_embeddings)
    return transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()


@torch.inference_mode()
def time_peer(peer: transformers.PreTrainedModel, prompt_len: int, output_len: int) -> Turn:
    """Prefill random tokens, then decode greedily: the prefill gives the first token, each step one more."""
    ids = torch.randint(0, peer.config.vocab_size, (1, prompt_len))
    start = time.perf_counter()
    out = peer(ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    int(token)
    prefill_s = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(output_len - 1):
        out = peer(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        int(token)  # a user reads each token
    return Turn(prefill=prompt_len / prefill_s, decode=(output_len - 1) / (time.perf_counter() - start))


def summarize(ours: list[Speeds], theirs: list[Turn], traffic: Traffic, bandwidths: list[Bandwidth]) -> dict[str, Any]:
    """Every pair, and the medians of speeds, of the pairs' ratios and of their shares of the bandwidth.

    Args:
        ours, theirs: one entry a pair.
        traffic: of our decoding.
        bandwidths: one before each pair, one at the end; a pair is compared with those on both sides of it.

    Raises:
        ValueError: the decode of a pair was too short to measure.
    """
    if any(speeds.decode_tokens_per_s is None for speeds in ours):
        raise ValueError("decoding was too short to measure; raise --output-len")
    pairs = []
    for index, (mine, peer) in enumerate(zip(ours, theirs, strict=True)):
        reads = decode_reads(traffic, mine, bandwidths[index] + bandwidths[index + 1])
        pairs.append({"ttft_s": mine.ttft_s, "prefill_tokens_per_s": mine.prefill_tokens_per_s, "decode_tokens_per_s": mine.decode_tokens_per_s,
                      "peer_prefill_tokens_per_s": peer.prefill, "peer_decode_tokens_per_s": peer.decode,
                      "prefill_ratio": mine.prefill_tokens_per_s / peer.prefill, "decode_ratio": mine.decode_tokens_per_s / peer.decode,
                      "decode_bytes_per_s": reads["bytes_per_s"], "share_of_median_bandwidth": reads["share_of_median_bandwidth"],
                      "share_of_best_bandwidth": reads["share_of_best_bandwidth"]})
    medians = {name: statistics.median(pair[name] for pair in pairs) for name in pairs[0]}
    return {"medians": medians, "pairs": pairs, "traffic": {**dataclasses.asdict(traffic), "bytes_per_token": traffic.bytes_per_token}}


def _print_table(report: dict[str, Any]) -> None:
    medians, machine, bandwidth = report["medians"], report["machine"], report["bandwidth"]
    load = ", ".join(f"{value:.1f}" for value in machine["load_average"])
    table = Table(title=f"{report['setup']['model']}, float32, {machine['cpu_model']}, {machine['num_cpus']} CPUs, load average {load} before",
                  title_justify="left")
    for heading in ("medians of pairs", "tpllm", "transformers", "ratio"):
        table.add_column(heading, justify="left" if heading == "medians of pairs" else "right")
    for name in ("prefill", "decode"):
        table.add_row(f"{name}, tokens/s", f"{medians[f'{name}_tokens_per_s']:.2f}", f"{medians[f'peer_{name}_tokens_per_s']:.2f}",
                      f"{medians[f'{name}_ratio']:.2f}")
    table.add_row("decode reads, GB/s", f"{medians['decode_bytes_per_s'] / 1e9:.1f}", "", "")
    table.add_row("memory reads, GB/s", f"{bandwidth['median_bytes_per_s'] / 1e9:.1f}", "", "")
    table.add_row("share of the median (best)",
                  f"{medians['share_of_median_bandwidth']:.0%} ({medians['share_of_best_bandwidth']:.0%})", "", "")
    Console(width=100).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
