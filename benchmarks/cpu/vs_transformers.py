"""tpllm beside transformers on this machine's CPU: latency of one row, and throughput of batches of prompts of mixed length.

  python -m benchmarks.cpu.vs_transformers --shape tinyllama-1.1b

Both models have the same sizes, random weights, one dtype and as many threads as there are cores. They live in one process and take turns:
ours, theirs, ours, theirs; a pair in which transformers runs at under 90 % of its own best is repeated (--max-repeats). Load averages and the
memory's read bandwidth are taken before and after each pair; by then torch's threads, which spin for some 10 ms after their work, sleep.

  latency   ours is `LLM.generate`, host work and sampling included. Theirs is a plain greedy loop over the model and its own cache, with logits
            of the last position only: no slower than its `generate`.
  batch-N   N prompts of a quarter of --prompt-len up to all of it, each completed by --output-len tokens. Ours is `LLM.generate` over N slots,
            theirs `generate` over the same prompts, padded on the left.

Theirs runs in eval and inference mode with sdpa attention. Prompts are new at each turn. The result, medians and every pair, is written to
--output, by default benchmarks/results/<date>-vs-transformers-<shape>-<dtype>.json.
"""
import argparse
import contextlib
import datetime
import functools
import json
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from tpllm import LLM, SamplingParams
from tpllm.bench.bandwidth import Bandwidth, host_bandwidth
from tpllm.bench.command import at_least, check_writable
from tpllm.bench.machine import describe_machine
from tpllm.bench.pairs import Pair, measure_pairs, summarize
from tpllm.bench.report import bandwidth_entry
from tpllm.bench.shapes import llm_of_shape
from tpllm.bench.timing import Workload
from tpllm.bench.traffic import decode_traffic
from tpllm.environment.memory import host_free_bytes
from tpllm.model.config import ModelConfig

RESULTS = pathlib.Path(__file__).parents[1] / "results"
DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write the result."""
    args = _parse(argv)
    path = args.output or RESULTS / f"{datetime.datetime.now(datetime.UTC).date()}-vs-transformers-{args.shape}-{args.dtype}.json"
    check_writable(str(path))
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(os.cpu_count())
    machine = {**describe_machine(jax.devices()[0]), "torch": torch.__version__, "transformers": transformers.__version__}
    report = {"benchmark": "vs transformers", "machine": machine, **compare(args)}
    path.write_text(json.dumps(report, indent=1) + "\n")
    _print_table(report)
    print(f"written to {path}")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tinyllama-1.1b", help="as for tpllm bench latency")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of both models (default float32)")
    parser.add_argument("--prompt-len", type=at_least(4), default=128, help="tokens of the longest prompts (default 128)")
    parser.add_argument("--output-len", type=at_least(2), default=33, help="tokens to generate; the first comes with the prefill (default 33)")
    parser.add_argument("--batch-sizes", type=at_least(1), nargs="*", default=[8, 16], help="of the throughput part (default 8 16); none skips it")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="pairs of each part that count (default 5)")
    parser.add_argument("--max-repeats", type=at_least(0), default=10, help="most pairs of each part beyond them (default 10)")
    parser.add_argument("--warmup", type=at_least(1), default=1, help="pairs before them that do not count; the first compiles (default 1)")
    parser.add_argument("--output", type=pathlib.Path, help="the file to write to")
    return parser.parse_args(argv)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Setup, every part's summary, and all samples of the bandwidth; JSON-able."""
    context = args.prompt_len + args.output_len
    with contextlib.ExitStack() as stack:
        llm = stack.enter_context(contextlib.closing(llm_of_shape(args.shape, mesh="tp=1", dtype=args.dtype, max_model_len=context, max_num_seqs=1)))
        peer = make_peer(llm.config, dtype=args.dtype, context=context)
        parts = {"latency": _compare_latency(llm, peer, args)}
        for size in args.batch_sizes:
            # The same weights behind as many slots as there are prompts; closing the first LLM gives them back.
            batched = LLM.from_params(llm.config, llm.params, max_model_len=context, max_num_seqs=size)
            parts[f"batch-{size}"] = _compare_batch(batched, peer, size, args)
    bandwidth = sum((pair.bandwidth for pairs in parts.values() for pair in pairs), Bandwidth(()))
    setup = {"model": args.shape, "dtype": args.dtype, "prompt_len": args.prompt_len, "output_len": args.output_len,
             "batch_sizes": args.batch_sizes, "num_rounds": args.rounds, "max_repeats": args.max_repeats, "num_warmup": args.warmup,
             "num_threads": torch.get_num_threads(), "peer_attention": peer.config._attn_implementation}
    return {"setup": setup, "parts": {name: summarize(pairs, num_pairs=args.rounds) for name, pairs in parts.items()},
            "load_average_after": list(os.getloadavg()),
            "bandwidth": bandwidth_entry(bandwidth, "host memory, one thread a core; samples before and after each pair")}


def make_peer(config: ModelConfig, *, dtype: str, context: int) -> transformers.PreTrainedModel:
    """transformers' model of the same sizes, with its own random weights. It never meets an end of sequence."""
    hf_config = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers, head_dim=config.head_dim,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads, intermediate_size=config.intermediate_size,
        max_position_embeddings=max(context, config.max_position), rms_norm_eps=config.norm_eps, tie_word_embeddings=config.ties_embeddings,
        bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return transformers.AutoModelForCausalLM.from_config(hf_config, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()


def _compare_latency(llm: LLM, peer: transformers.PreTrainedModel, args: argparse.Namespace) -> list[Pair]:
    lengths = {"batch_size": 1, "prompt_len": args.prompt_len, "output_len": args.output_len}
    traffic = decode_traffic(llm.config, llm.params, kv_dtype=args.dtype, **lengths)
    workload = Workload(llm.config.vocab_size, **lengths)

    def run_ours() -> dict[str, float]:
        speeds = workload.speeds([workload.time_run(llm)])
        if speeds.decode_tokens_per_s is None:
            raise ValueError("decoding was too short to measure; raise --output-len")
        return {"ttft_s": speeds.ttft_s, "prefill_tokens_per_s": speeds.prefill_tokens_per_s, "decode_tokens_per_s": speeds.decode_tokens_per_s,
                "decode_bytes_per_s": traffic.bytes_per_token * speeds.decode_tokens_per_s}
    # The first run compiles, and its times are no speeds.
    return _take_turns(lambda: workload.time_run(llm), run_ours, functools.partial(time_peer_row, peer, args.prompt_len, args.output_len), args)


def _compare_batch(llm: LLM, peer: transformers.PreTrainedModel, size: int, args: argparse.Namespace) -> list[Pair]:
    rng = np.random.default_rng(size)
    lengths = np.linspace(args.prompt_len // 4, args.prompt_len, size).round().astype(int)

    def prompts() -> list[list[int]]:
        return [rng.integers(0, llm.config.vocab_size, length).tolist() for length in rng.permutation(lengths)]

    def run_ours() -> dict[str, float]:
        return time_batch(llm, prompts(), args.output_len)
    return _take_turns(run_ours, run_ours, lambda: time_peer_batch(peer, prompts(), args.output_len), args)


def _take_turns(warm_up, run_ours, run_peer, args: argparse.Namespace) -> list[Pair]:
    for _ in range(args.warmup):
        warm_up()
        run_peer()
    return measure_pairs(run_ours, run_peer, num_pairs=args.rounds, max_repeats=args.max_repeats,
                         measure_bandwidth=lambda: host_bandwidth(host_free_bytes()))


@torch.inference_mode()
def time_peer_row(peer: transformers.PreTrainedModel, prompt_len: int, output_len: int) -> dict[str, float]:
    """Prefill random tokens, then decode greedily: the prefill gives the first token, each step one more."""
    ids = torch.randint(0, peer.config.vocab_size, (1, prompt_len))
    start = time.perf_counter()
    out = peer(ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    int(token)
    ttft_s = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(output_len - 1):
        out = peer(token, cache=out.cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        int(token)  # a user reads each token
    return {"ttft_s": ttft_s, "prefill_tokens_per_s": prompt_len / ttft_s, "decode_tokens_per_s": (output_len - 1) / (time.perf_counter() - start)}


def time_batch(llm: LLM, prompts: list[list[int]], output_len: int) -> dict[str, float]:
    """Complete all prompts by ``output_len`` tokens each."""
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return _batch_speed([output.outputs[0].token_ids for output in outputs], output_len, time.perf_counter() - start)


@torch.inference_mode()
def time_peer_batch(peer: transformers.PreTrainedModel, prompts: list[list[int]], output_len: int) -> dict[str, float]:
    """The same through ``generate``."""
    width = max(map(len, prompts))
    start = time.perf_counter()
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = peer.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=output_len, use_cache=True)
    return _batch_speed(out[:, width:].tolist(), output_len, time.perf_counter() - start)


def _batch_speed(completions: list[list[int]], output_len: int, seconds: float) -> dict[str, float]:
    if {len(completion) for completion in completions} != {output_len}:
        raise ValueError(f"rows gave {sorted(map(len, completions))} tokens, not {output_len} each")
    return {"seconds": seconds, "output_tokens_per_s": len(completions) * output_len / seconds}


def _print_table(report: dict[str, Any]) -> None:
    setup, machine, bandwidth = report["setup"], report["machine"], report["bandwidth"]
    load = ", ".join(f"{value:.1f}" for value in machine["load_average"])
    table = Table(title=f"{setup['model']}, {setup['dtype']}, {machine['cpu_model']}, {setup['num_threads']} threads, load average {load} before",
                  title_justify="left")
    for heading in ("tokens/s, medians", "tpllm", "transformers", "ratio", "pairs (repeated)"):
        table.add_column(heading, justify="left" if heading == "tokens/s, medians" else "right")
    for part, summary in report["parts"].items():
        medians, count = summary["medians"], f"{summary['num_counted']} ({summary['num_repeats']}){'' if summary['is_steady'] else ' unsteady'}"
        for name in (name.removesuffix("_ratio") for name in medians if name.endswith("_ratio")):
            ours, peer = medians[f"{name}_per_s"], medians[f"peer_{name}_per_s"]
            table.add_row(f"{part}: {name.removesuffix('_tokens')}", f"{ours:.2f}", f"{peer:.2f}", f"{medians[f'{name}_ratio']:.2f}", count)
    Console(width=110).print(table)
    reads = report["parts"]["latency"]["medians"]["decode_bytes_per_s"]
    print(f"decode of one row reads {reads / 1e9:.1f} GB/s, {reads / bandwidth['median_bytes_per_s']:.0%} of the memory's "
          f"{bandwidth['median_bytes_per_s'] / 1e9:.1f} ({bandwidth['best_bytes_per_s'] / 1e9:.1f} at best)")


if __name__ == "__main__":
    raise SystemExit(main())
