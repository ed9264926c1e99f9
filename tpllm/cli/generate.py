"""Complete one prompt and print the text as it is generated.

The prompt is --prompt, or standard input (its last line break is left out). Sampling options that are not given are the model's own.
"""
import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from tpllm.engine.sampling_params import SamplingParams

# One completion of plain text is printed: these have nowhere to go.
NOT_FOR_TEXT = ("n", "logprobs", "prompt_logprobs")
FIELDS = {field.name: field for field in dataclasses.fields(SamplingParams) if field.name not in NOT_FOR_TEXT}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--model", required=True, help="a folder, a hub id, or 'demo'")
    parser.add_argument("--prompt", help="the text to complete; standard input if not given")
    parser.add_argument("--mesh", default="auto", help="such as 'tp=4'; by default all local devices")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16")
    parser.add_argument("--max-model-len", type=int, help="tokens of prompt and completion together")
    parser.add_argument("--revision", help="of a hub id")
    group = parser.add_argument_group("sampling")
    for name, field in FIELDS.items():
        flag = "--" + name.replace("_", "-")
        if field.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        elif name == "stop":
            group.add_argument(flag, action="append", default=None, metavar="TEXT", help="end where this text appears; may be given several times")
        else:
            group.add_argument(flag, metavar=name.upper(), default=None)


def run(args: argparse.Namespace, *, make_llm: Callable[..., Any] | None) -> int:
    """Run the command; returns the exit code."""
    sampling = _sampling(args)
    SamplingParams(**sampling)  # a bad value is refused before a model is loaded
    prompt = _prompt(args)
    make_llm = make_llm or _llm_class()
    llm = make_llm(args.model, mesh=args.mesh, dtype=args.dtype, max_model_len=args.max_model_len, max_num_seqs=1, revision=args.revision)
    with contextlib.closing(llm):
        deltas = llm.stream(prompt, SamplingParams(**{**llm.default_sampling, **sampling}))
        with contextlib.closing(deltas):
            for delta in deltas:
                sys.stdout.write(delta.text)
                sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return 0


def _llm_class() -> Callable[..., Any]:
    from tpllm.llm import LLM
    return LLM


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    from tpllm.jobs.yaml_file import parse_value
    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    return {name: parse_value(value, "--" + name.replace("_", "-")) if isinstance(value, str) else value for name, value in given.items()}


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    if sys.stdin.isatty():
        print("tpllm: reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
    return sys.stdin.read().removesuffix("\n")
