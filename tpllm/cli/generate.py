"""Complete one prompt and print the text as it is generated.

The prompt is --prompt, or standard input (its last line break is left out). Sampling options that are not given are the model's own.
"""
import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import Any

from tpllm.cli.model_options import add_model_options, add_sampling_options, load_llm, sampling_of
from tpllm.engine.sampling_params import SamplingParams
from tpllm.errors import PromptError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_options(parser)
    parser.add_argument("--prompt", help="the text to complete; standard input if not given")
    parser.add_argument("--parse-special", action=argparse.BooleanOptionalAction, default=None,
                        help="read special-token text in the prompt, such as <|im_end|>, as special tokens; so it is by default")
    add_sampling_options(parser)


def run(args: argparse.Namespace, *, make_llm: Callable[..., Any] | None) -> int:
    """Run the command; returns the exit code."""
    sampling = sampling_of(args)  # a bad value is refused before a model is loaded
    text = _prompt(args)
    prompt = text if args.parse_special is None else {"prompt": text, "parse_special": args.parse_special}
    with contextlib.closing(load_llm(args, make_llm)) as llm:
        deltas = llm.stream(prompt, SamplingParams(**{**llm.default_sampling, **sampling}))
        with contextlib.closing(deltas):
            for delta in deltas:
                sys.stdout.write(delta.text)
                sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    if sys.stdin.isatty():
        print("tpllm: reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
    try:
        return sys.stdin.read().removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read the prompt from standard input: {getattr(error, 'strerror', None) or error}; give text in "
                          f"{sys.stdin.encoding}, or --prompt TEXT") from None
