"""Talk with a model in the terminal; it sees the whole conversation, through its own chat template.

    /reset          forget the conversation (the system prompt stays)
    /system TEXT    forget the conversation and give a new system prompt; without text, none
    /exit           leave, as Ctrl-D does; Ctrl-C stops an answer
"""
import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

from tpllm.cli.entry import raise_interrupts
from tpllm.cli.model_options import add_model_options, add_sampling_options, load_llm, sampling_of
from tpllm.engine.sampling_params import SamplingParams
from tpllm.errors import ConfigError, PromptError, TokenizerError, short


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_options(parser)
    parser.add_argument("--system", help="the system prompt")
    parser.add_argument("--template-kwargs", metavar="JSON", help="more variables for the chat template, as in '{\"enable_thinking\": false}'")
    add_sampling_options(parser)


def run(args: argparse.Namespace, *, make_llm: Callable[..., Any] | None) -> int:
    """Run the command; returns the exit code."""
    sampling, template_kwargs = sampling_of(args), _template_kwargs(args.template_kwargs)
    with contextlib.closing(load_llm(args, make_llm)) as llm:
        chat = Chat(llm, SamplingParams(**{**llm.default_sampling, **sampling}), template_kwargs=template_kwargs, system=args.system)
        _edit_lines()
        raise_interrupts()
        for line in _lines():
            if line == "/exit":
                break
            chat.take(line)
    return 0


class Chat:
    """A conversation and the model that answers.

    Args:
        llm: what answers.
        params: how it is sampled.
        template_kwargs: more variables for the chat template.
        system: the system prompt, or None.
    """

    def __init__(self, llm: Any, params: SamplingParams, *, template_kwargs: dict[str, Any], system: str | None):
        self._llm, self._params, self._template_kwargs = llm, params, template_kwargs
        self.reset(system)

    def reset(self, system: str | None) -> None:
        """Begin anew."""
        self.messages = [{"role": "system", "content": system}] if system else []

    def take(self, line: str) -> None:
        """Do what a line says: a command, or something to answer."""
        command, _, rest = line.partition(" ")
        if command == "/reset":
            self.reset(next((message["content"] for message in self.messages if message["role"] == "system"), None))
        elif command == "/system":
            self.reset(rest.strip() or None)
        elif command.startswith("/"):
            print(f"unknown command {command}; known: /reset, /system TEXT, /exit", file=sys.stderr)
        elif line.strip():
            self._answer(line)

    def _answer(self, line: str) -> None:
        self.messages.append({"role": "user", "content": line})
        text = ""
        try:
            with contextlib.closing(self._llm.stream({"messages": self.messages, "template_kwargs": self._template_kwargs}, self._params)) as deltas:
                for delta in deltas:
                    text += delta.text
                    sys.stdout.write(delta.text)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            pass  # what was said so far stays in the conversation
        except (PromptError, TokenizerError) as error:
            self.messages.pop()
            print(f"tpllm: {error}; /reset begins anew", file=sys.stderr)
            return
        sys.stdout.write("\n")
        self.messages.append({"role": "assistant", "content": text})


def _lines():
    """What the user types, line by line; Ctrl-C at the prompt drops the line."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PromptError(f"cannot read from standard input: {reason}; give text in {sys.stdin.encoding}") from None
        except KeyboardInterrupt:
            print()


def _edit_lines() -> None:
    """Arrow keys and history at the prompt, where the platform has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401


def _template_kwargs(text: str | None) -> dict[str, Any]:
    try:
        value = {} if text is None else json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"--template-kwargs is {short(text)}; give a JSON object, as in '{{\"enable_thinking\": false}}'")
    return value
