'''Talk with a model in the terminal. The model sees the whole conversation, through its own chat template.

  tpllm chat HuggingFaceTB/SmolLM2-135M-Instruct
  tpllm chat model.Q4_K_M.gguf --system "Be brief."

In the conversation a line that begins with one of these is a command:

    /clear          forget the conversation; the system prompt stays
    /system TEXT    forget the conversation and give a new system prompt; without
                    text, none
    /regen          answer the last message again
    /save FILE      write the conversation, a row that 'tpllm run' takes
    /help           show these commands
    /exit           leave, as Ctrl-D does; Ctrl-C stops an answer
    """             begin a message of several lines, and end it
'''
import argparse
import contextlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from tpllm import __version__
from tpllm.cli.entry import raise_interrupts
from tpllm.cli.model_options import add_answer_options, load_llm, model_of, params_for, sampling_of, template_kwargs_of
from tpllm.cli.speed import Speed
from tpllm.cli.status import StatusLine
from tpllm.engine.sampling_params import SamplingParams
from tpllm.errors import PromptError, TokenizerError, did_you_mean

BLOCK = '"""'
COMMANDS = ("/clear", "/system", "/regen", "/save", "/help", "/exit")
HELP = inspect.cleandoc(__doc__).rpartition("\n\n")[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_answer_options(parser, max_tokens="what the context holds")


def run(args: argparse.Namespace, *, make_llm: Callable[..., Any] | None) -> int:
    """Run the command; returns the exit code."""
    model, sampling, template_kwargs = model_of(args), sampling_of(args), template_kwargs_of(args)
    with StatusLine(f"loading {model}"):
        llm = load_llm(args, make_llm)
    with contextlib.closing(llm):
        chat = Chat(llm, params_for(llm, sampling), template_kwargs=template_kwargs, system=args.system, quiet=args.quiet)
        if sys.stdin.isatty():
            print(banner(model, llm), file=sys.stderr)
        _edit_lines()
        raise_interrupts()
        for message in _messages():
            if message == "/exit":
                break
            chat.take(message)
    return 0


def banner(model: str, llm: Any) -> str:
    """What is talked with: the model, what computes it, and how much it can remember."""
    from tpllm.engine.description import kernels_of
    return f"tpllm {__version__}: {model}, kernels: {kernels_of(llm.params)}, context: {llm.shapes.max_model_len} tokens; /help shows the commands"


class Chat:
    """A conversation and the model that answers.

    Args:
        llm: what answers.
        params: how it is sampled.
        template_kwargs: more variables for the chat template.
        system: the system prompt, or None.
        quiet: whether the speed of answers is left out.
    """

    def __init__(self, llm: Any, params: SamplingParams, *, template_kwargs: dict[str, Any], system: str | None, quiet: bool = False):
        self._llm, self._params, self._template_kwargs, self._quiet = llm, params, template_kwargs, quiet
        self._doing = "compiling"  # and later, while the prompt is read
        self.clear(system)

    def clear(self, system: str | None) -> None:
        """Begin anew."""
        self.messages = [{"role": "system", "content": system}] if system else []

    def take(self, message: str) -> None:
        """Do what a message says: a command, or something to answer."""
        command, _, rest = message.partition(" ")
        if command in ("/clear", "/reset"):
            self.clear(next((message["content"] for message in self.messages if message["role"] == "system"), None))
        elif command == "/system":
            self.clear(rest.strip() or None)
        elif command == "/regen":
            self._answer_again()
        elif command == "/save":
            self._save(rest.strip())
        elif command == "/help":
            print(HELP, file=sys.stderr)
        elif command.startswith("/") and "\n" not in message:
            print(f"tpllm: unknown command {command}; {did_you_mean(command, COMMANDS)}/help shows the commands", file=sys.stderr)
        elif message.strip():
            self.messages.append({"role": "user", "content": message})
            self._answer()

    def _answer(self) -> None:
        text, speed = "", Speed()
        try:
            with StatusLine(self._doing) as status, kept_end_of_input():
                prompt = {"messages": self.messages, "template_kwargs": self._template_kwargs}
                with contextlib.closing(self._llm.stream(prompt, self._params)) as deltas, contextlib.closing(speed.count(deltas)) as pieces:
                    for piece in pieces:
                        status.clear()
                        text += piece
                        print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass  # what was said so far stays in the conversation
        except (PromptError, TokenizerError) as error:
            self.messages.pop()
            print(f"tpllm: {error}; /clear begins anew", file=sys.stderr)
            return
        print(flush=True)
        self._doing = "reading the conversation"
        self.messages.append({"role": "assistant", "content": text})
        if not self._quiet:
            print(speed, file=sys.stderr)

    def _answer_again(self) -> None:
        if self._params.is_greedy:
            print("tpllm: at temperature 0 the answer stays the same; start the chat with --temp, as in --temp 0.7", file=sys.stderr)
        elif self.messages[-1:] and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
            self._answer()
        else:
            print("tpllm: there is no answer yet", file=sys.stderr)

    def _save(self, path: str) -> None:
        if not path:
            print("tpllm: write the file's name, as in /save talk.jsonl", file=sys.stderr)
            return
        try:
            with open(os.path.expanduser(path), "x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except (OSError, UnicodeEncodeError) as error:
            print(f"tpllm: cannot write {path}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)


def _messages() -> Iterator[str]:
    """What the user types: lines, and the text between two times three quotation marks. Ctrl-C at the prompt drops it."""
    while True:
        try:
            text = _read_line("> ")
            if text.startswith(BLOCK):
                text = text.removeprefix(BLOCK)
                while not text.endswith(BLOCK):
                    text += "\n" + _read_line("... ")
                text = text.removesuffix(BLOCK).strip("\n")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
        else:
            yield text


def _read_line(prompt: str) -> str:
    try:
        return input(prompt if sys.stdin.isatty() else "")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptError(f"cannot read from standard input: {reason}; give text in {sys.stdin.encoding}") from None


def _edit_lines() -> None:
    """Arrow keys and history at the prompt, where the platform has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401


@contextlib.contextmanager
def kept_end_of_input() -> Iterator[None]:
    """While the block runs, a terminal keeps Ctrl-D for the next prompt, like any other key. It would mark the end of its own line, which readline
    never sees."""
    if "readline" not in sys.modules or not sys.stdin.isatty():
        yield
        return
    import termios
    settings = termios.tcgetattr(sys.stdin)
    keys = [*settings[6]]
    keys[termios.VEOF] = bytes([os.fpathconf(sys.stdin.fileno(), "PC_VDISABLE")])
    termios.tcsetattr(sys.stdin, termios.TCSANOW, [*settings[:6], keys])
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, settings)
