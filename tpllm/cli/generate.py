"""Answer a prompt, and print the answer as it is generated.

  tpllm generate HuggingFaceTB/SmolLM2-135M-Instruct -p "What is the capital of France?"
  tpllm generate model.Q4_K_M.gguf --prompt-file question.txt --temp 0
  tpllm generate demo --raw -p "def " -n 32

A model with a chat template gets the prompt as a user's message; with --raw, and without
a template, it goes on with the text. The prompt is --prompt, a file, or standard input;
the last line break is left out. Standard error gets the speed.
"""
import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tpllm.cli.model_options import add_answer_options, load_llm, model_of, params_for, sampling_of, template_kwargs_of
from tpllm.cli.speed import Speed
from tpllm.cli.status import StatusLine
from tpllm.engine.sampling_params import SamplingParams
from tpllm.errors import ConfigError, PromptError, TpllmError

MAX_TOKENS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt; standard input if it is not given")
    prompts.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file")
    parser.add_argument("--lines", action="store_true", help="each line is a prompt of its own")
    parser.add_argument("--raw", action="store_true", help="go on with the text: do not apply the chat template")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each prompt: its answer, token counts and times")
    parser.add_argument("--parse-special", action=argparse.BooleanOptionalAction, default=None,
                        help="read special-token text in the prompt, such as <|im_end|>, as special tokens (default: yes with --raw, no in a chat)")
    add_answer_options(parser, max_tokens=f"{MAX_TOKENS}, or what the context holds")


def run(args: argparse.Namespace, *, make_llm: Callable[..., Any] | None) -> int:
    """Run the command; returns the exit code."""
    model, sampling, template_kwargs = model_of(args), sampling_of(args), template_kwargs_of(args)  # refused before a model is loaded
    if args.raw and (args.system or template_kwargs):
        raise ConfigError("--system and --template-kwargs are for the chat template, which --raw turns off; leave --raw out, or both of them")
    prompts = _prompts(args)
    first, speed = next(prompts), Speed()
    with StatusLine(f"loading {model}") as status, contextlib.closing(load_llm(args, make_llm)) as llm:
        status.say("compiling")
        params = params_for(llm, sampling, max_tokens=MAX_TOKENS)
        is_chat = not args.raw and llm.get_tokenizer().has_chat_template
        if args.system and not is_chat:
            raise ConfigError(f"--system is given, and the model {model} has no chat template; put the text into the prompt")
        for text in itertools.chain([first], prompts):
            prompt = _as_chat(text, args.system, template_kwargs) if is_chat else text
            if args.parse_special is not None:
                prompt = {**(prompt if is_chat else {"prompt": prompt}), "parse_special": args.parse_special}
            pieces = _answer_as_json(llm, text, prompt, params, speed) if args.json else speed.count(llm.stream(prompt, params))
            _write(pieces, status)
    if not args.quiet:
        print(speed, file=sys.stderr)
    return 0


def _write(pieces: Iterable[str], status: StatusLine) -> None:
    for piece in pieces:
        status.clear()
        print(piece, end="", flush=True)
    print(flush=True)


def _as_chat(text: str, system: str | None, template_kwargs: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    return {"messages": [*messages, {"role": "user", "content": text}], "template_kwargs": template_kwargs}


def _answer_as_json(llm: Any, text: str, prompt: Any, params: SamplingParams, speed: Speed) -> Iterator[str]:
    output = llm.generate(prompt, params, use_tqdm=False)[0]
    completion, times, own = output.outputs[0], output.metrics, Speed()
    if completion.error is not None:
        raise TpllmError(completion.error)
    for each in (speed, own):
        each.add(len(completion.token_ids), first_s=times.first_token_time - times.arrival_time, later_s=times.finished_time - times.first_token_time,
                 was_cut=completion.finish_reason == "length")
    yield json.dumps({"prompt": text, "text": completion.text, "finish_reason": completion.finish_reason,
                      "prompt_tokens": len(output.prompt_token_ids), "completion_tokens": len(completion.token_ids),
                      "time_to_first_token_s": round(own.first_s, 4), "tokens_per_s": own.per_second and round(own.per_second, 2)},
                     ensure_ascii=False)


def _prompts(args: argparse.Namespace) -> Iterator[str]:
    """The prompts, none of them empty; lines are read when they are wanted."""
    if args.prompt is not None:
        texts = args.prompt.splitlines() if args.lines else [args.prompt]
    elif args.lines:
        texts = (line.rstrip("\r\n") for line in _read(args.prompt_file, iter))
    else:
        texts = (text.removesuffix("\n") for text in _read(args.prompt_file, lambda file: [file.read()]))
    num_prompts = 0
    for text in texts:
        if text:
            num_prompts += 1
            yield text
    if not num_prompts:
        raise PromptError("the prompt is empty; give at least one character")


def _read(path: str | None, parts: Callable[[Any], Iterable[str]]) -> Iterator[str]:
    """The parts of a file, or of standard input where there is no path."""
    name = "standard input" if path is None else path
    if path is None and sys.stdin.isatty():
        print("tpllm: reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
    try:
        with contextlib.nullcontext(sys.stdin) if path is None else open(path, encoding="utf-8") as file:
            yield from parts(file)
    except (OSError, UnicodeDecodeError) as error:
        fix = f"give text in {file.encoding}" if isinstance(error, UnicodeDecodeError) else "give a file that can be read"
        raise PromptError(f"cannot read the prompt from {name}: {getattr(error, 'strerror', None) or error}; {fix}, or --prompt TEXT") from None
