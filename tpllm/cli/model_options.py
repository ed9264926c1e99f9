"""The options of every command that completes text: which model, on which mesh, sampled how."""
import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from tpllm.cli.help_text import attribute_texts
from tpllm.engine.sampling_params import SamplingParams

# One completion of plain text is printed: these have nowhere to go.
NOT_FOR_TEXT = ("n", "logprobs", "prompt_logprobs", "detokenize", "output_kind")
FIELDS = {field.name: field for field in dataclasses.fields(SamplingParams) if field.name not in NOT_FOR_TEXT}
METAVARS = {"logit_bias": "'{ID: BIAS, ...}'", "allowed_token_ids": "'[ID, ...]'", "stop_token_ids": "'[ID, ...]'"}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that choose a model and where it runs."""
    parser.usage = "%(prog)s --model MODEL [OPTIONS]"
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, help="a folder in Hugging Face layout, a hub id, or 'demo'")
    group.add_argument("--mesh", default="auto", help="such as 'tp=4' or 'dp=2,tp=4'; default: all local devices on the tensor axis")
    group.add_argument("--dtype", default="auto", help="of weights and activations: auto, float32, bfloat16 or float16")
    group.add_argument("--quantization", help="quantize weights while they are loaded: int8, int4, fp8, ... or 'PATTERN=NAME,...'")
    group.add_argument("--max-model-len", type=int, metavar="N", help="most tokens of prompt and completion together")
    group.add_argument("--revision", help="branch, tag or commit of a hub id")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Declare one option for each field of ``SamplingParams`` that serves plain text."""
    group = parser.add_argument_group("sampling", "What is not given is the model's own default, then this.")
    texts = attribute_texts(SamplingParams)
    for name, field in FIELDS.items():
        flag, text = "--" + name.replace("_", "-"), texts[name]
        if field.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif name in ("stop", "bad_words"):
            group.add_argument(flag, action="append", default=None, metavar="TEXT", help=f"{text}; may be given several times")
        else:
            default = "" if field.default in (None, (), dataclasses.MISSING) else f" (default {field.default:g})"
            group.add_argument(flag, metavar=METAVARS.get(name, "N" if "int" in str(field.type) else "X"), default=None, help=text + default)


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given, checked.

    Raises:
        SamplingError: a value out of its range.
    """
    from tpllm.engine.whole_numbers import whole_sampling
    from tpllm.jobs.yaml_file import parse_value

    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    sampling = {name: parse_value(value, "--" + name.replace("_", "-")) if isinstance(value, str) else value for name, value in given.items()}
    sampling = whole_sampling(sampling)
    SamplingParams(**sampling)
    return sampling


def load_llm(args: argparse.Namespace, make_llm: Callable[..., Any] | None) -> Any:
    """The model the options name, for one row at a time: as many slots as the mesh has data groups."""
    from sharding_rules import parse_mesh
    if make_llm is None:
        import tpllm.llm  # loads jax
        make_llm = tpllm.llm.LLM
    num_seqs = 1 if args.mesh == "auto" else parse_mesh(args.mesh).get("dp", 1)
    return make_llm(args.model, mesh=args.mesh, dtype=args.dtype, quantization=args.quantization, max_model_len=args.max_model_len,
                    max_num_seqs=num_seqs, revision=args.revision)
