"""How the command line explains itself: one-line errors, the layout of ``--help``, and option texts that come from docstrings."""
import argparse
import inspect
import re
import shutil
import textwrap
from typing import NoReturn

MAX_WIDTH = 110
OPTION_WIDTH = 28  # columns of the left side; longer options get a line of their own
ENTRY = re.compile(r"^    (?P<name>\w+): (?P<text>.*(?:\n     .*)*)", re.M)
EXIT_NO_OUTPUT, EXIT_USER_ERROR = 1, 2


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        self.exit(EXIT_USER_ERROR, f"tpllm: error: {message}; see {self.prog} --help\n")


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
