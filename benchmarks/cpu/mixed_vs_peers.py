"""A workload of mixed lengths on this machine's CPU: tpllm's continuous batching beside its own static batching, llama.cpp's parallel decoding and
transformers' continuous batching.

  python -m benchmarks.cpu.mixed_vs_peers
  python -m benchmarks.cpu.mixed_vs_peers --shape tiny --num-requests 12 --prompt-lens 4 64 --output-lens 2 64 --rounds 1 --max-repeats 0   # a trial

All requests are there from the start and are admitted in their order to --max-num-seqs sequences; each gets exactly its tokens, greedily. Models
have the same sizes, random weights, and one thread a core (or TPLLM_NUM_THREADS).

  bf16   ours in bfloat16; llama.cpp F16; transformers bfloat16      int8   llama.cpp Q8_0      int4   llama.cpp Q4_0

  continuous, static   tpllm: the same engine and kernels; static batching fills the sequences only when the last is free
  llama_cpp            `llama_decode` on batches of up to 512 tokens: the next token of every sequence, then prompt tokens of those just admitted;
                       file read into memory, keys and values in float16. Fused attention or not, and one cache for all sequences or one for
                       each: a trial of --trial-requests requests finds the fastest of the four, which then takes part
  transformers         what `generate_batch` does, with a length for each request: sdpa attention over a paged cache, steps of up to 512 tokens

All live in one process and take turns: a round is one turn of each, with a pause of 50 ms before. A round in which a peer runs at under 90 % of its
own best is repeated (--max-repeats). Load averages and the memory's read bandwidth are taken before and after each round. The gain that the
lengths allow over static batching is computed as in `tpllm bench throughput`.

The result, medians, ratios and every round, is written to --output after each kind, by default
benchmarks/results/<date>-mixed-vs-peers-<shape>.json.
"""
import argparse
import contextlib
import datetime
import functools
import pathlib
import statistics
import time
from typing import Any

import jax
import llama_cpp
import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.cpu.peers import gguf_file, llama_cpp_model
from benchmarks.cpu.peers.cells import PAUSE_S, num_threads
from benchmarks.cpu.peers.kinds import PEER_TYPES, check_build, compare_kinds
from benchmarks.cpu.peers.llama_cpp_parallel import BATCH, PeerRequest, choose_context, time_parallel
from benchmarks.cpu.peers.ours import open_ours
from benchmarks.cpu.peers.transformers_batch import time_batch
from benchmarks.cpu.vs_transformers import make_peer
from tpllm import LLM
from tpllm.bench.bandwidth import Bandwidth, host_bandwidth
from tpllm.bench.batching import BatchRun, measure_costs
from tpllm.bench.command import at_least, check_writable
from tpllm.bench.machine import describe_machine
from tpllm.bench.pairs import measure_pairs, summarize
from tpllm.bench.report import bandwidth_entry
from tpllm.bench.shapes import find_shape
from tpllm.bench.subject import add_length_arguments, lengths_of
from tpllm.bench.throughput import KINDS as OURS
from tpllm.bench.throughput import gain_entry
from tpllm.bench.workload import Item, make_workload
from tpllm.environment.memory import host_free_bytes
from tpllm.environment.threads import limit_threads
from tpllm.errors import ConfigError

RESULTS = pathlib.Path(__file__).parents[1] / "results"
PEERS = ("llama_cpp", "transformers")
OF_PAIRS = "output_tokens_per_s"


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write the result."""
    args = _parse(argv)
    path = args.output or RESULTS / f"{datetime.datetime.now(datetime.UTC).date()}-mixed-vs-peers-{args.shape}.json"
    check_writable(str(path))
    config, lengths = find_shape(args.shape), lengths_of(args)
    if lengths.context_len > config.max_position:
        raise ConfigError(f"the longest row has {lengths.context_len} tokens, {args.shape} has a context of {config.max_position}; "
                          "lower --prompt-lens or --output-lens")
    check_build(is_slow_allowed=args.allow_slow_peer)
    jax.config.update("jax_platforms", "cpu")
    limit_threads()
    torch.set_num_threads(num_threads())
    items = make_workload(config.vocab_size, lengths)
    machine = {**describe_machine(jax.devices()[0]), "llama_cpp_python": llama_cpp.__version__, "llama_cpp_system": llama_cpp_model.system_line(),
               "torch": torch.__version__, "transformers": transformers.__version__}
    setup = {**{name: value for name, value in vars(args).items() if name != "output"}, "num_threads": num_threads(), "peer_kv_cache": "f16",
             "peer_batch": BATCH, "pause_s": PAUSE_S, "num_prompt_tokens": sum(len(item.prompt_token_ids) for item in items),
             "num_output_tokens": sum(item.output_len for item in items)}
    report = {"benchmark": "mixed lengths vs peers", "machine": machine, "setup": setup, "kinds": {}}
    return compare_kinds(report, path, config, functools.partial(compare_kind, items=items, args=args), print_kind,
                         needs_file="llama_cpp" in args.peers)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-160m", help="as for tpllm bench throughput (default llama-160m)")
    parser.add_argument("--kinds", nargs="+", choices=PEER_TYPES, default=["bf16"], help="of weights (default bf16); transformers takes part in bf16")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="who takes part (default: both)")
    parser.add_argument("--max-num-seqs", type=at_least(1), default=8, metavar="N", help="sequences at once, of each side (default 8)")
    add_length_arguments(parser, num_requests=256)
    parser.add_argument("--trial-requests", type=at_least(1), default=16, metavar="N", help="the first of them warm up each side (default 16)")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="that count (default 3)")
    parser.add_argument("--max-repeats", type=at_least(0), default=2, help="most rounds beyond them (default 2)")
    parser.add_argument("--allow-slow-peer", action="store_true", help="go on with a build of llama.cpp that does not use all of this CPU")
    parser.add_argument("--output", type=pathlib.Path, help="the file to write to")
    return parser.parse_args(argv)


def compare_kind(kind: str, f16: pathlib.Path, items: list[Item], args: argparse.Namespace) -> dict[str, Any]:
    """Every round with one kind of weights, their medians and ratios, and the gain that the lengths allow; JSON-able."""
    context_len, trial = lengths_of(args).context_len, items[:args.trial_requests]
    with contextlib.ExitStack() as stack:
        llm = stack.enter_context(contextlib.closing(open_ours(args.shape, None if kind == "bf16" else f"*={kind}", context_len=context_len,
                                                               num_seqs=args.max_num_seqs)))
        llm.warm_up()
        for take in OURS.values():
            take(llm, trial)
        peers, entry = _open_peers(kind, f16, llm, items, args, stack)
        costs, last = measure_costs(llm, items), {}
        pairs = measure_pairs(lambda: _run_ours(llm, items, last), lambda: _run_peers(peers), num_pairs=args.rounds, max_repeats=args.max_repeats,
                              measure_bandwidth=lambda: host_bandwidth(host_free_bytes()))
    summary, bandwidth = summarize(pairs, num_pairs=args.rounds), sum((pair.bandwidth for pair in pairs), Bandwidth(()))
    for one in summary["pairs"]:
        one["ratios"] = _ratios(one, list(peers))
    counted = [one["ratios"] for one in summary["pairs"] if one["counts"]]
    ratios = {name: statistics.median(one[name] for one in counted) for name in counted[0]}
    seconds = {name: {"seconds": summary["medians"][f"{name}_seconds"]} for name in OURS}
    summary["rounds"] = summary.pop("pairs")
    return {**entry, "ratios": ratios, "gain": gain_entry(items, costs, seconds, num_slots=args.max_num_seqs), **summary,
            "bandwidth": bandwidth_entry(bandwidth, "host memory, one thread a core; samples before and after each round"),
            "timelines": {name: run.timeline.as_lists() for name, run in last.items()}}


def _open_peers(kind: str, f16: pathlib.Path, llm: LLM, items: list[Item], args: argparse.Namespace,
                stack: contextlib.ExitStack) -> tuple[dict[str, Any], dict[str, Any]]:
    """(a turn of each peer by its name, what is to be said of them); the stack closes them."""
    requests = [PeerRequest(item.prompt_token_ids, item.output_len) for item in items]
    trial, peers, entry = requests[:args.trial_requests], {}, {}
    sizes = {"num_seqs": args.max_num_seqs, "context_len": lengths_of(args).context_len}
    if "llama_cpp" in args.peers:
        path = f16.with_name(f"{PEER_TYPES[kind]}.gguf")
        if path != f16:
            gguf_file.quantize(f16, path, PEER_TYPES[kind])
            stack.callback(path.unlink)
        gguf_file.check_types(path, find_shape(args.shape), PEER_TYPES[kind])
        model = stack.enter_context(contextlib.closing(llama_cpp_model.PeerModel(path)))
        context, trials = choose_context(model, trial, num_threads=num_threads(), **sizes)
        stack.callback(context.close)
        entry["llama_cpp"] = {"type": PEER_TYPES[kind], "trials_tokens_per_s": trials, "chosen": llama_cpp_model.best_attention(trials)}
        peers["llama_cpp"] = lambda: time_parallel(context, requests)
    if "transformers" in args.peers and kind == "bf16":
        peer_model = make_peer(llm.config, dtype="bfloat16", context=sizes["context_len"])
        time_batch(peer_model, trial[:2], **sizes)
        entry["transformers"] = {"attention": peer_model.config._attn_implementation}
        peers["transformers"] = lambda: time_batch(peer_model, requests, **sizes)
    if not peers:
        raise ConfigError(f"nobody takes part beside {kind}; transformers does in bf16 alone, so add llama_cpp to --peers")
    return peers, entry


def _run_ours(llm: LLM, items: list[Item], last: dict[str, BatchRun]) -> dict[str, float]:
    numbers = {}
    for name, take in OURS.items():
        time.sleep(PAUSE_S)
        last[name] = take(llm, items)
        found = last[name].numbers()
        numbers |= {f"{name}_{key}": found[key] for key in ("seconds", OF_PAIRS, "slot_occupancy", "host_share", "tokens_per_step_and_slot")}
    return numbers


def _run_peers(peers: dict[str, Any]) -> dict[str, float]:
    return {f"{name}_{key}": value for name, take in peers.items() for key, value in take().items()}


def _ratios(numbers: dict[str, float], peers: list[str]) -> dict[str, float]:
    """Continuous batching's speed over each other's."""
    ours = numbers[f"continuous_{OF_PAIRS}"]
    return {"static": ours / numbers[f"static_{OF_PAIRS}"], **{name: ours / numbers[f"peer_{name}_{OF_PAIRS}"] for name in peers}}


def print_kind(report: dict[str, Any], kind: str) -> None:
    """One kind of weights for people, on standard output."""
    setup, machine, entry = report["setup"], report["machine"], report["kinds"][kind]
    load, medians, gain = ", ".join(f"{value:.1f}" for value in machine["load_average"]), entry["medians"], entry["gain"]
    table = Table(title=f"{setup['shape']}, {kind}, {setup['num_requests']} requests over {setup['max_num_seqs']} sequences, "
                        f"{machine['cpu_model']}, {setup['num_threads']} threads, load average {load} before", title_justify="left")
    for heading in ("medians", "output tokens/s", "seconds", "continuous is faster by"):
        table.add_column(heading, justify="left" if heading == "medians" else "right")
    names = {"continuous": "", "static": "", **{name: "peer_" for name in PEERS if name in entry["ratios"]}}
    for name, prefix in names.items():
        ratio = entry["ratios"].get(name)
        table.add_row(name, f"{medians[f'{prefix}{name}_{OF_PAIRS}']:.1f}", f"{medians[f'{prefix}{name}_seconds']:.2f}",
                      "" if ratio is None else f"{ratio:.2f}")
    Console(width=110).print(table)
    allowed = "too short to be costed" if gain["allowed"] is None else f"{gain['allowed']:.2f}, of which {gain['share_of_allowed']:.0%} were reached"
    print(f"the gain over static batching that the lengths allow: {allowed}; slots busy until the queue is empty: "
          f"{medians['continuous_slot_occupancy']:.1%}; {entry['num_counted']} rounds, {entry['num_repeats']} repeated"
          f"{'' if entry['is_steady'] else ', unsteady'}")


if __name__ == "__main__":
    raise SystemExit(main())
