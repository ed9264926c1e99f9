"""What the demo writes at temperature 0 is what the documentation shows, by the command that it shows."""
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from tools.doc_blocks import matches, read_blocks

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "getting_started.md"


def first_text() -> tuple[list[str], str, str]:
    """(the words after ``tpllm`` of the page's first `tpllm generate`, what it prints, its line on standard error)."""
    command, *text, speed = next(block.lines for block in read_blocks(PAGE.name, PAGE.read_text()) if block.lines[0].startswith("$ tpllm generate"))
    return shlex.split(command)[2:], "\n".join([*text, ""]), speed


@pytest.mark.newest
@pytest.mark.slow
@pytest.mark.parametrize("native", ["1", "0"])
def test_the_command_line_prints_the_documented_text_with_the_native_library_and_without_and_warns_of_nothing(native, request):
    if native == "1":
        request.getfixturevalue("native_library")
    words, text, speed = first_text()
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device, and programs as users have them
    done = subprocess.run([sys.executable, "-W", "error", "-m", "tpllm.cli.main", *words], env={**environment, "TPLLM_NATIVE": native},
                          capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.returncode) == (text, 0)
    assert matches(speed, done.stderr)
