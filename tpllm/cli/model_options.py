"""The options of every command that completes text: which model, on which mesh, sampled how."""
import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Container
from typing import Any

from tpllm.cli.help_text import MODEL_TEXT, attribute_texts
from tpllm.engine.sampling_params import SamplingParams
from tpllm.errors import ConfigError, short

# One completion of plain text is printed: these have nowhere to go.
NOT_FOR_TEXT = ("n", "logprobs", "prompt_logprobs")
METAVARS = {"logit_bias": "'{ID: BIAS, ...}'", "allowed_token_ids": "'[ID, ...]'", "stop_token_ids": "'[ID, ...]'"}
SHORT_FLAGS = {"max_tokens": "-n", "temperature": "--temp"}
ENGINE_OPTIONS = ("mesh", "dtype", "quantization", "kv_cache_dtype", "max_model_len", "revision")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that choose a model and where it runs."""
    parser.usage = "%(prog)s MODEL [OPTIONS]"
    group = parser.add_argument_group("model")
    group.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_TEXT)
    group.add_argument("-m", "--model", dest="model_option", metavar="MODEL", help="the model, in place of the first argument")
    add_engine_options(group)
    group.add_argument("-t", "--threads", type=_positive, metavar="N", help="threads that compute on a CPU; default: one for each core")


def add_engine_options(group: argparse._ArgumentGroup) -> None:
    """Declare one option for each of ``ENGINE_OPTIONS``."""
    group.add_argument("--mesh", help="such as 'tp=4' or 'dp=2,tp=4'; default: all local devices on the tensor axis")
    group.add_argument("--dtype", help="of weights and activations: auto, float32, bfloat16 or float16")
    group.add_argument("--quantization", help="quantize weights while they are loaded: int8, int4, fp8, ... or 'PATTERN=NAME,...'")
    group.add_argument("--kv-cache-dtype", metavar="NAME", help="of keys and values: auto, float32, bfloat16, float16, int8 or fp8")
    group.add_argument("--max-model-len", type=int, metavar="N", help="most tokens of prompt and completion together")
    group.add_argument("--revision", help="branch, tag or commit of a hub id")


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of commands that use the model's chat template."""
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument("--template-kwargs", metavar="JSON", help="more variables for the chat template, as in '{\"enable_thinking\": false}'")
    parser.add_argument("--quiet", action="store_true", help="do not print the speed on standard error")


def add_sampling_options(parser: argparse.ArgumentParser, *, max_tokens: str, leaves_out: Container[str] = NOT_FOR_TEXT) -> None:
    """Declare one option for each field of ``SamplingParams`` but those left out; ``max_tokens`` is that field's default, in words."""
    group = parser.add_argument_group("sampling", "What is not given is the model's own default, then this.")
    texts = attribute_texts(SamplingParams) | {"max_tokens": f"most tokens to generate (default: {max_tokens})"}
    for name, field in _fields(leaves_out).items():
        flags, text = ["--" + name.replace("_", "-")], texts[name]
        if name in SHORT_FLAGS:
            flags.append(SHORT_FLAGS[name])
        if field.type is bool:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif name in ("stop", "bad_words"):
            group.add_argument(*flags, action="append", default=None, metavar="TEXT", help=f"{text}; may be given several times")
        else:
            default = "" if field.default in (None, (), dataclasses.MISSING) else f" (default {field.default:g})"
            group.add_argument(*flags, metavar=METAVARS.get(name, "N" if "int" in str(field.type) else "X"), default=None, help=text + default)


def _fields(leaves_out: Container[str]) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(SamplingParams) if field.name not in leaves_out}


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def model_of(args: argparse.Namespace) -> str:
    """The model that is named.

    Raises:
        ConfigError: none, or two.
    """
    named = [model for model in (args.model, args.model_option) if model is not None]
    if len(named) == 2:
        raise ConfigError(f"two models are named, {short(named[0])} and {short(named[1])} (--model); name one, and give a prompt as --prompt TEXT")
    if not named:
        raise ConfigError("no model is named; name one as the first argument or with --model ('tpllm list' shows those on this machine)")
    return named[0]


def template_kwargs_of(args: argparse.Namespace) -> dict[str, Any]:
    """The variables for the chat template that were given.

    Raises:
        ConfigError: no JSON object.
    """
    try:
        value = {} if args.template_kwargs is None else json.loads(args.template_kwargs)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"--template-kwargs is {short(args.template_kwargs)}; give a JSON object, as in '{{\"enable_thinking\": false}}'")
    return value


def sampling_of(args: argparse.Namespace, *, leaves_out: Container[str] = NOT_FOR_TEXT) -> dict[str, Any]:
    """The sampling options that were given, checked; ``leaves_out`` is as :func:`add_sampling_options` had it.

    Raises:
        SamplingError: a value out of its range.
    """
    from tpllm.engine.whole_numbers import whole_sampling
    from tpllm.jobs.yaml_file import parse_value

    given = {name: getattr(args, name) for name in _fields(leaves_out) if getattr(args, name) is not None}
    sampling = {name: parse_value(value, "--" + name.replace("_", "-")) if isinstance(value, str) else value for name, value in given.items()}
    sampling = whole_sampling(sampling)
    SamplingParams(**sampling)
    return sampling


def load_llm(args: argparse.Namespace, make_llm: Callable[..., Any] | None) -> Any:
    """The model the options name, for one row at a time: as many slots as the mesh has data groups."""
    from sharding_rules import parse_mesh
    if args.threads is not None:
        os.environ["TPLLM_NUM_THREADS"] = str(args.threads)
    if make_llm is None:
        import tpllm.llm  # loads jax
        make_llm = tpllm.llm.LLM
    given = {name: value for name in ENGINE_OPTIONS if (value := getattr(args, name)) is not None}
    num_seqs = 1 if given.get("mesh", "auto") == "auto" else parse_mesh(args.mesh).get("dp", 1)
    return make_llm(model_of(args), max_num_seqs=num_seqs, **given)
