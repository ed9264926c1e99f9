"""The options of every command that completes text: which model, on which mesh, sampled how."""
import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from tpllm.engine.sampling_params import SamplingParams

# One completion of plain text is printed: these have nowhere to go.
NOT_FOR_TEXT = ("n", "logprobs", "prompt_logprobs")
FIELDS = {field.name: field for field in dataclasses.fields(SamplingParams) if field.name not in NOT_FOR_TEXT}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that choose a model and where it runs."""
    parser.add_argument("--model", required=True, help="a folder, a hub id, or 'demo'")
    parser.add_argument("--mesh", default="auto", help="such as 'tp=4'; by default all local devices")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16")
    parser.add_argument("--max-model-len", type=int, help="tokens of prompt and completion together")
    parser.add_argument("--revision", help="of a hub id")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Declare one option for each field of ``SamplingParams`` that serves plain text."""
    group = parser.add_argument_group("sampling")
    for name, field in FIELDS.items():
        flag = "--" + name.replace("_", "-")
        if field.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        elif name == "stop":
            group.add_argument(flag, action="append", default=None, metavar="TEXT", help="end where this text appears; may be given several times")
        else:
            group.add_argument(flag, metavar=name.upper(), default=None)


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given, checked.

    Raises:
        SamplingError: a value out of its range.
    """
    from tpllm.jobs.yaml_file import parse_value

    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    sampling = {name: parse_value(value, "--" + name.replace("_", "-")) if isinstance(value, str) else value for name, value in given.items()}
    SamplingParams(**sampling)
    return sampling


def load_llm(args: argparse.Namespace, make_llm: Callable[..., Any] | None) -> Any:
    """The model the options name, for one row at a time."""
    if make_llm is None:
        import tpllm.llm  # loads jax
        make_llm = tpllm.llm.LLM
    return make_llm(args.model, mesh=args.mesh, dtype=args.dtype, max_model_len=args.max_model_len, max_num_seqs=1, revision=args.revision)
