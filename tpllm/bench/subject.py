"""What benchmarks measure: the options that name a model, an engine and a workload, and the model opened by them."""
import argparse
from collections.abc import Callable
from typing import Any

import jax

from sharding_rules import mesh_text
from tpllm.bench.command import above_zero, at_least
from tpllm.bench.shapes import SHAPES, find_shape, llm_of_shape
from tpllm.bench.workload import MixedLengths
from tpllm.errors import ConfigError
from tpllm.llm import LLM


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that name the model."""
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--model", help="a folder, a GGUF file, a hub id, or a name such as 'demo'")
    subject.add_argument("--shape", metavar="NAME", help=f"random weights of a known shape: {', '.join(SHAPES)}")
    parser.add_argument("--mesh", default="auto", help="such as 'tp=4'; by default all local devices")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16")
    parser.add_argument("--quantization", help="of the weights: int8 or int4")


def add_subject_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that name the model and the engine."""
    add_model_arguments(parser)
    parser.add_argument("--kv-cache-dtype", default="auto", metavar="NAME", help="float32, bfloat16, float16, int8 or fp8 (default: as --dtype)")
    parser.add_argument("--max-num-seqs", type=at_least(1), metavar="N", help="slots (default 8 on a CPU, 32 elsewhere)")


def add_length_arguments(parser: argparse.ArgumentParser, *, num_requests: int) -> None:
    """Declare the options of the workload's lengths."""
    default = MixedLengths()
    parser.add_argument("--num-requests", type=at_least(1), default=num_requests, metavar="N", help=f"requests (default {num_requests})")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="chooses lengths, tokens and arrivals (default 0)")
    for name in ("prompt", "output"):
        low, high = getattr(default, f"{name}_lens")
        parser.add_argument(f"--{name}-lens", type=at_least(1), nargs=2, default=[low, high], metavar=("MIN", "MAX"),
                            help=f"tokens of the {name}s (default {low} {high})")
    parser.add_argument("--output-median", type=above_zero, default=default.output_median, metavar="X",
                        help=f"of the log-normal outputs before they are cut (default {default.output_median:g})")
    parser.add_argument("--output-sigma", type=above_zero, default=default.output_sigma, metavar="X",
                        help=f"of their logarithm (default {default.output_sigma:g})")


def lengths_of(args: argparse.Namespace, *, rate: float | None = None) -> MixedLengths:
    """The workload's lengths as the options say."""
    return MixedLengths(num_requests=args.num_requests, seed=args.seed, prompt_lens=tuple(args.prompt_lens), output_lens=tuple(args.output_lens),
                        output_median=args.output_median, output_sigma=args.output_sigma, rate=rate)


def make_llm(args: argparse.Namespace, **options: Any) -> LLM:
    """The model of the options."""
    make: Callable[..., LLM] = llm_of_shape if args.shape else LLM
    return make(args.shape or args.model, mesh=args.mesh, dtype=args.dtype, quantization=args.quantization, **options)


def open_subject(args: argparse.Namespace, *, max_model_len: int | None, max_num_seqs: int | None, **engine: Any) -> LLM:
    """The model of the options, warmed up.

    Raises:
        ConfigError: an unknown shape, or one with a shorter context.
    """
    if args.shape and (max_model_len or 0) > (context := find_shape(args.shape).max_position):
        raise ConfigError(f"the longest row has {max_model_len} tokens, {args.shape} has a context of {context}; ask for shorter prompts or outputs")
    llm = make_llm(args, kv_cache_dtype=args.kv_cache_dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs, **engine)
    try:
        jax.block_until_ready(llm.params)
        llm.warm_up()
    except BaseException:
        llm.close()
        raise
    return llm


def model_entry(args: argparse.Namespace, llm: LLM) -> dict[str, Any]:
    """The model that was measured; JSON-able."""
    found = llm.fingerprint()
    return {"model": args.shape or args.model, "has_random_weights": bool(args.shape), "mesh": mesh_text(llm.config.partition.mesh),
            "dtype": str(llm.params.dtype), "quantization": args.quantization, "kernels": found["kernels"],
            "kv_cache_dtype": found["kv_cache_dtype"]}


def subject_entry(args: argparse.Namespace, llm: LLM) -> dict[str, Any]:
    """The model and the engine that were measured; JSON-able."""
    return {**model_entry(args, llm), "max_num_seqs": llm.shapes.max_num_seqs, "max_model_len": llm.shapes.max_model_len,
            "page_size": llm.shapes.page_size}


def title(report: dict[str, Any]) -> str:
    """Two lines above a table: the subject, and the machine."""
    setup, machine = report["setup"], report["machine"]
    load = ", ".join(f"{value:.1f}" for value in machine["load_average"])
    weights = f"{' (random weights)' if setup['has_random_weights'] else ''}, {setup['quantization'] or setup['dtype']}"
    return (f"{setup['model']}{weights}, mesh {setup['mesh']} ({machine['platform']}), {setup['max_num_seqs']} slots\n"
            f"{machine['cpu_model']}, {machine['num_cpus']} CPUs, load average {load} before")
