"""``--help``: every option says what it does."""
import argparse
import ast
import dataclasses
import pathlib

import pytest

from tpllm.cli import help_text
from tpllm.cli.bench import BenchParser
from tpllm.cli.help_text import HelpFormatter, attribute_texts
from tpllm.cli.main import COMMANDS, main, make_parser
from tpllm.cli.model_options import NOT_FOR_TEXT
from tpllm.engine.sampling_params import SamplingParams

FOLDER = pathlib.Path(help_text.__file__).parent


def subparsers(parser: argparse.ArgumentParser):
    """A parser and all below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from subparsers(subparser)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_of_every_command_has_a_help_text(name):
    for parser in subparsers(make_parser((name,))):
        unexplained = [action for action in parser._actions if not action.help and not isinstance(action, argparse._SubParsersAction)]
        assert unexplained == []


def test_examples_stay_indented_where_python_takes_away_what_all_lines_of_a_docstring_are_indented_by():
    """From 3.13 on it does so; what is not indented is wrapped."""
    for path in FOLDER.glob("*.py"):
        lines = (ast.get_docstring(ast.parse(path.read_text()), clean=False) or "").splitlines()[1:]
        indented = [line for line in lines if line.startswith(" ")]
        assert not indented or any(line and not line.startswith(" ") for line in lines), path


def test_every_sampling_field_has_an_option_explained_by_its_docstring(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(SamplingParams):
        assert (f"\n  --{field.name.replace('_', '-')} " in shown.replace(",", " ")) == (field.name not in NOT_FOR_TEXT)
    assert "divides the logits; 0 takes the best token" in " ".join(shown.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_no_line_of_a_help_is_wider_than_88_columns(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for parser in subparsers(make_parser((name,))):
        if isinstance(parser, BenchParser):
            parser.load(parser.prog.split()[-1])
        assert [line for line in parser.format_help().splitlines() if len(line) > 88] == []


def test_the_docstring_of_the_sampling_parameters_tells_of_every_field():
    texts = attribute_texts(SamplingParams)
    assert set(texts) == {field.name for field in dataclasses.fields(SamplingParams)}
    assert texts["temperature"] == "divides the logits; 0 takes the best token (greedy)"
    assert texts["top_k"].endswith("Tokens tied with the last one kept are kept too")  # the second line of its entry


def test_paragraphs_are_wrapped_to_the_terminal_and_examples_are_not(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = HelpFormatter("tpllm")._fill_text("word " * 40 + "\n\n  tpllm run " + "x" * 80 + "\n  tpllm chat", 58, "")
    paragraph, example = text.split("\n\n")
    assert max(map(len, paragraph.splitlines())) <= 58
    assert example == "  tpllm run " + "x" * 80 + "\n  tpllm chat"
