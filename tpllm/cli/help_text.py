"""How the command line explains itself: one-line errors, the layout of ``--help``, and option texts that come from docstrings."""
import argparse
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import NoReturn

from tpllm.errors import did_you_mean, short

MAX_WIDTH = 88
OPTION_WIDTH = 28  # columns of the left side; longer options get a line of their own
ENTRY = re.compile(r"^    (?P<name>\w+): (?P<text>.*(?:\n     .*)*)", re.M)
MODEL_TEXT = "a folder in Hugging Face layout, a GGUF file, a hub id ('owner/name', or 'owner/name:Q4_K_M' for GGUF), or a name such as 'demo'"
EXIT_NO_OUTPUT, EXIT_USER_ERROR = 1, 2


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line. The line names the nearest word that the parser knows, and the help of the parser's own command.

    Attributes:
        is_partial: whether another parser reads the words that this one does not know.
        takes_keys: whether options with a dot, as in ``--engine.page-size 32``, and their values are left to the command, as ``keys``; ``_`` in an
            option's name is then as good as ``-``.
    """

    is_partial = takes_keys = False

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """Parse the words as argparse does, but refuse what is unknown: an unknown option before a required argument that is missing."""
        words = sys.argv[1:] if args is None else list(args)
        if self.is_partial:
            return super().parse_known_args(words, namespace)
        keys = self._take_keys(words) if self.takes_keys else []
        self._refuse_unknown_options(words)
        namespace, rest = super().parse_known_args(words, namespace)
        if rest:
            self.error(f"unknown {'option' if rest[0].startswith('-') else 'argument'} {short(rest[0])}")
        if self.takes_keys:
            namespace.keys = keys
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        message = message.strip(" ;")
        self.exit(EXIT_USER_ERROR, f"tpllm: error: {message}{'' if message.endswith('?') else ';'} see {self.prog} --help\n")

    def _refuse_unknown_options(self, words: Sequence[str]) -> None:
        passes_words_on = any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions)
        for word in words:
            name = word.partition("=")[0]
            if word == "--" or (passes_words_on and not word.startswith("-")):
                return
            if name.startswith("--") and " " not in name and name not in self._option_string_actions:
                known = (option for option in self._option_string_actions if option.startswith("--"))
                self.error(f"unknown option {name!r}; {did_you_mean(name, known)}")

    @staticmethod
    def _take_keys(words: list[str]) -> list[str]:
        """Take the options with a dot out of the words; each with its value, which has a word of its own or follows ``=``."""
        keys, rest = [], words[:]
        words.clear()
        while rest:
            name, equals, value = rest.pop(0).partition("=")
            word = (name.replace("_", "-") if name.startswith("--") else name) + equals + value
            is_key = name.startswith("--") and "." in name
            (keys if is_key else words).append(word)
            if is_key and not equals and rest and not rest[0].startswith("--"):
                keys.append(rest.pop(0))
        return keys

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            raise argparse.ArgumentError(action, f"unknown value {value!r}; {did_you_mean(str(value), known)}known: {', '.join(known)}")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Two columns as wide as the terminal allows, and examples as they are written."""

    def __init__(self, prog: str):
        width = min(shutil.get_terminal_size().columns - 2, MAX_WIDTH)
        super().__init__(prog, max_help_position=OPTION_WIDTH, width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Paragraphs are wrapped; indented lines (commands, tables) stay as they are."""
        blocks = (block if "\n " in f"\n{block}" else textwrap.fill(block, width) for block in text.strip("\n").split("\n\n"))
        return textwrap.indent("\n\n".join(blocks), indent)


def attribute_texts(documented: type) -> dict[str, str]:
    """What a class's docstring says of each attribute (its ``Attributes:`` section), for use as help texts."""
    _, _, section = inspect.getdoc(documented).partition("Attributes:\n")
    return {entry["name"]: " ".join(entry["text"].split()).rstrip(".").replace("%", "%%") for entry in ENTRY.finditer(section.split("\n\n")[0])}
