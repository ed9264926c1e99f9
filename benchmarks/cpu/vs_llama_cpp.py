"""tpllm beside llama.cpp on this machine's CPU: decode and prefill with 16-bit, 8-bit and 4-bit weights, and the memory each takes.

  python -m benchmarks.cpu.vs_llama_cpp --shape tinyllama-1.1b

Both models have the same sizes, random weights, and one thread a core (or TPLLM_NUM_THREADS). llama.cpp opens files that this script writes into a
temporary folder (TMPDIR says where; 3.5 GB for tinyllama-1.1b) and removes; all matrices of a file have one type, but those of Q4_K_M and Q5_K_M,
which are mixed as llama.cpp's quantizer mixes them.

  bf16   ours in bfloat16; theirs F16         int8   theirs Q8_0         int4   theirs Q4_0
  q8_0, q4_0, q4_k_m, q5_k_m, q6_k            both open the same file

For each kind of weights there are these cells, in tokens/s; --contexts, --prompts, --batch-size and --decode-steps change them, --cells chooses:

  decode-1-at-128, decode-8-at-128   decode steps of 1 row, and of 8 rows together, after prompts of 128 tokens
  decode-1-at-1900                   three times as many steps (as far as the shape's context goes), for there the prefill weighs more
  prefill-128, prefill-1024          one prompt, until its first token is known

Ours is `LLM.generate` on token ids, greedy, host work and sampling included. Decoding is what a call for all tokens takes beyond a call for one;
after prompts of 1024 tokens and more, what one call takes from its first token on.
Theirs is its C functions: one `llama_decode` for the prompts, then one for each step, its caches in float16; the best token is found by numpy in
its own logits. It is given the faster of its two attentions (fused or not), which a trial of both finds in each cell; the file is read into
memory, not mapped.

Both live in one process and take turns: ours, theirs, ours, theirs, with a pause of 50 ms in which the other side's threads, which spin for a
while after their work, go to sleep. A pair in which llama.cpp runs at under 90 % of its own best is repeated (--max-repeats). Load averages and
the memory's read bandwidth are taken before and after each pair. A build of llama.cpp that leaves instruction sets of this CPU unused is refused.

Peak memory is measured in processes of their own: the longest of --prompts is read and decoded on. Ours, with its programs in the compile cache
and (in brackets) compiling them, is compared with 1.1 times theirs plus what `import tpllm, jax` takes.

The result, medians and every pair, is written to --output after each kind, by default
benchmarks/results/<date>-cpu-vs-llama-cpp-<shape>.json.
"""
import argparse
import contextlib
import dataclasses
import datetime
import functools
import pathlib
from typing import Any

import jax
import llama_cpp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.cpu.peers import gguf_file, llama_cpp_model
from benchmarks.cpu.peers.cells import PAUSE_S, Cell, num_threads
from benchmarks.cpu.peers.kinds import ALL_TYPES, FILE_TYPES, PEER_TYPES, check_build, compare_kinds
from benchmarks.cpu.peers.memory import measure_memory
from benchmarks.cpu.peers.ours import open_ours, our_turns
from tpllm import LLM
from tpllm.bench.bandwidth import Bandwidth, host_bandwidth
from tpllm.bench.command import at_least, check_writable
from tpllm.bench.machine import describe_machine
from tpllm.bench.pairs import STEADY_SHARE, measure_pairs, summarize
from tpllm.bench.report import bandwidth_entry
from tpllm.bench.shapes import find_shape
from tpllm.environment.memory import host_free_bytes
from tpllm.environment.threads import limit_threads
from tpllm.errors import ConfigError
from tpllm.model.config import ModelConfig

RESULTS = pathlib.Path(__file__).parents[1] / "results"


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write the result."""
    args = _parse(argv)
    path = args.output or RESULTS / f"{datetime.datetime.now(datetime.UTC).date()}-cpu-vs-llama-cpp-{args.shape}.json"
    check_writable(str(path))
    config = find_shape(args.shape)
    args.decode_steps = args.decode_steps or (32 if gguf_file.num_weights(config) >= 10**9 else 64)
    cells = choose_cells(config, args)
    check_references(args.peer_at_least, cells, args.kinds)
    check_build(is_slow_allowed=args.allow_slow_peer)
    jax.config.update("jax_platforms", "cpu")
    limit_threads()
    machine = {**describe_machine(jax.devices()[0]), "llama_cpp_python": llama_cpp.__version__, "llama_cpp_system": llama_cpp_model.system_line()}
    setup = {**{name: value for name, value in vars(args).items() if name != "output"}, "num_threads": num_threads(), "peer_kv_cache": "f16",
             "peer_micro_batch": llama_cpp_model.MICRO_BATCH, "num_trials": llama_cpp_model.NUM_TRIALS, "pause_s": PAUSE_S}
    report = {"benchmark": "CPU vs llama.cpp", "machine": machine, "setup": setup, "kinds": {}}
    return compare_kinds(report, path, config, functools.partial(compare_kind, cells=cells, args=args), print_kind)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tinyllama-1.1b", help="as for tpllm bench latency")
    parser.add_argument("--kinds", nargs="+", choices=ALL_TYPES, default=list(PEER_TYPES),
                        help=f"of weights (default: {' '.join(PEER_TYPES)})")
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="what to measure (default: all)")
    parser.add_argument("--contexts", type=at_least(1), nargs="+", default=[128, 1900], help="to decode at (default 128 1900)")
    parser.add_argument("--prompts", type=at_least(1), nargs="+", default=[128, 1024], help="tokens to prefill (default 128 1024)")
    parser.add_argument("--batch-size", type=at_least(2), default=8, help="rows together, at the first of the contexts (default 8)")
    parser.add_argument("--decode-steps", type=at_least(1), help="default 32 for shapes of 10^9 weights or more, 64 for smaller ones")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="pairs of each cell that count (default 5)")
    parser.add_argument("--max-repeats", type=at_least(0), default=10, help="most pairs of each cell beyond them (default 10)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the measurement of peak memory")
    parser.add_argument("--peer-at-least", type=_reference, action="append", default=[], metavar="KIND:CELL=TOK_S",
                        help="what llama.cpp is known to reach here, such as int4:decode-1-at-128=42; the result says whether it came to 90 %% of it")
    parser.add_argument("--allow-slow-peer", action="store_true", help="go on with a build of llama.cpp that does not use all of this CPU")
    parser.add_argument("--output", type=pathlib.Path, help="the file to write to")
    return parser.parse_args(argv)


def _reference(text: str) -> tuple[str, str, float]:
    kind, _, rest = text.partition(":")
    cell, _, speed = rest.partition("=")
    try:
        return kind, cell, float(speed)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not KIND:CELL=TOK_S, such as int4:decode-1-at-128=42") from None


def choose_cells(config: ModelConfig, args: argparse.Namespace) -> list[Cell]:
    """The cells to measure.

    Raises:
        ConfigError: one is unknown, or longer than the shape's context.
    """
    short, *longer = args.contexts
    cells = [Cell(f"decode-{rows}-at-{short}", rows, short, args.decode_steps) for rows in (1, args.batch_size)]
    for context in longer:
        num_steps = max(args.decode_steps, min(3 * args.decode_steps, config.max_position - context - 1))
        cells.append(Cell(f"decode-1-at-{context}", 1, context, num_steps))
    cells += [Cell(f"prefill-{prompt_len}", 1, prompt_len) for prompt_len in args.prompts]
    names = [cell.name for cell in cells]
    if unknown := set(args.cells or names) - set(names):
        raise ConfigError(f"--cells {' '.join(sorted(unknown))}: there are {', '.join(names)}")
    chosen = [cell for cell in cells if args.cells is None or cell.name in args.cells]
    memory = [] if args.no_memory else [Cell("memory", 1, max(args.prompts), args.decode_steps)]
    for cell in (*chosen, *memory):
        if cell.context_len > config.max_position:
            raise ConfigError(f"{cell.name} needs {cell.context_len} tokens of context, {args.shape} has {config.max_position}; "
                              "lower --contexts, --prompts or --decode-steps")
    return chosen


def check_references(references: list[tuple[str, str, float]], cells: list[Cell], kinds: list[str]) -> None:
    """Refuse a speed of the peer for a cell that is not measured."""
    names = [cell.name for cell in cells]
    for kind, cell, _ in references:
        if kind not in kinds or cell not in names:
            raise ConfigError(f"--peer-at-least {kind}:{cell} is not measured; kinds: {', '.join(kinds)}; cells: {', '.join(names)}")


def compare_kind(kind: str, f16: pathlib.Path, cells: list[Cell], args: argparse.Namespace) -> dict[str, Any]:
    """Every cell with one kind of weights, then the memory; JSON-able."""
    peer_type, is_file = ALL_TYPES[kind], kind in FILE_TYPES
    path = f16.with_name(f"{peer_type}.gguf")
    if path != f16:
        gguf_file.quantize(f16, path, peer_type)
    if peer_type not in gguf_file.MIXED:
        gguf_file.check_types(path, find_shape(args.shape), peer_type)
    ours = {"path": str(path)} if is_file else {"shape": args.shape, "quantization": None if kind == "bf16" else f"*={kind}"}
    references = {cell: speed for named, cell, speed in args.peer_at_least if named == kind}
    with (contextlib.closing(open_ours(**ours, context_len=cells[0].context_len, num_seqs=1)) as first,
          contextlib.closing(llama_cpp_model.PeerModel(path)) as model):
        entries = {cell.name: compare_cell(cell, first, model, args, references.get(cell.name)) for cell in cells}
    memory = None if args.no_memory else measure_memory(path, ours, prompt_len=max(args.prompts), num_steps=args.decode_steps)
    entry = {"peer_type": peer_type, "peer_file_bytes": path.stat().st_size, "cells": entries, "memory": memory}
    if path != f16:
        path.unlink()
    return entry


def compare_cell(cell: Cell, first: LLM, model: llama_cpp_model.PeerModel, args: argparse.Namespace, reference: float | None) -> dict[str, Any]:
    """One cell's sizes, its pairs and their medians, and the memory's bandwidth meanwhile.

    Args:
        cell: what to measure.
        first: an engine over our weights; the cell's own has its sizes.
        model: the peer's weights.
        args: of the command line.
        reference: tokens/s that the peer is known to reach, or None.
    """
    rng = np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        llm = stack.enter_context(contextlib.closing(
            LLM.from_params(first.config, first.params, max_model_len=cell.context_len, max_num_seqs=cell.num_rows)))
        context, trials = llama_cpp_model.choose_attention(cell, model, rng)
        stack.callback(context.close)
        pairs = measure_pairs(our_turns(cell, llm, rng), lambda: llama_cpp_model.time_peer(cell, context, model.vocab_size, rng),
                              num_pairs=args.rounds, max_repeats=args.max_repeats, measure_bandwidth=lambda: host_bandwidth(host_free_bytes()))
    summary, bandwidth = summarize(pairs, num_pairs=args.rounds), sum((pair.bandwidth for pair in pairs), Bandwidth(()))
    medians = summary["medians"]
    entry = {**dataclasses.asdict(cell), "peer_attention_trials": trials, "peer_attention": llama_cpp_model.best_attention(trials),
             "bandwidth": bandwidth_entry(bandwidth, "host memory, one thread a core; samples before and after each pair"), **summary}
    if cell.num_steps:
        entry["share_of_median_bandwidth"] = medians["decode_bytes_per_s"] / bandwidth.median
    if reference is not None:
        share = medians["peer_tokens_per_s"] / reference
        entry["peer_reference"] = {"tokens_per_s": reference, "share": share, "is_reached": share >= STEADY_SHARE}
    return entry


def print_kind(report: dict[str, Any], kind: str) -> None:
    """One kind of weights for people, on standard output."""
    setup, machine, entry = report["setup"], report["machine"], report["kinds"][kind]
    load = ", ".join(f"{value:.1f}" for value in machine["load_average"])
    table = Table(title=f"{setup['shape']}, {kind} beside {entry['peer_type']}, {machine['cpu_model']}, {setup['num_threads']} threads, "
                        f"load average {load} before", title_justify="left")
    for heading in ("tokens/s, medians", "tpllm", "llama.cpp", "ratio", "of the bandwidth", "pairs (repeated)"):
        table.add_column(heading, justify="left" if heading == "tokens/s, medians" else "right")
    for name, cell in entry["cells"].items():
        medians, share = cell["medians"], cell.get("share_of_median_bandwidth")
        pairs = f"{cell['num_counted']} ({cell['num_repeats']}){'' if cell['is_steady'] else ' unsteady'}"
        table.add_row(name, f"{medians['tokens_per_s']:.2f}", f"{medians['peer_tokens_per_s']:.2f}", f"{medians['tokens_ratio']:.2f}",
                      "" if share is None else f"{share:.0%}", pairs)
    Console(width=110).print(table)
    for name, cell in entry["cells"].items():
        if (reference := cell.get("peer_reference")) and not reference["is_reached"]:
            print(f"{name} does not count: llama.cpp came to {reference['share']:.0%} of {reference['tokens_per_s']:g} tokens/s")
    if memory := entry["memory"]:
        ours, compiling, peer_bytes = (memory[side]["peak_bytes"] / 1e9 for side in ("ours", "ours_compiling", "peer"))
        print(f"peak memory: {ours:.2f} GB ({compiling:.2f} where programs are compiled), llama.cpp {peer_bytes:.2f}; over 1.1 times that and "
              f"{memory['ours']['import_bytes'] / 1e9:.2f} of imports: {memory['ratio']:.2f} ({memory['ratio_compiling']:.2f})")
    elif not setup["no_memory"]:
        print("peak memory: not measured, for this system has no /proc/self/status")


if __name__ == "__main__":
    raise SystemExit(main())
