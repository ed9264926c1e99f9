"""What a command says on a terminal while it loads and compiles, and that nothing of it stays or goes anywhere else."""
import os
import pathlib
import pty
import re
import signal
import subprocess
import sys

import pytest

from tpllm.cli.status import ERASE

REPOSITORY = pathlib.Path(__file__).parents[2]
SLOW = """
import logging, sys, time
from tests.jobs.fake_llm import FakeLLM
from tpllm.cli import entry
class Slow(FakeLLM):
    def __init__(self, model, **options):
        super().__init__(model)
        time.sleep(0.1)
        logging.getLogger("tpllm").warning("a warning")
        time.sleep({seconds})
    def stream(self, *asked):
        time.sleep({seconds})
        yield from super().stream(*asked)
sys.argv[1:] = ["generate", "fake", "-p", "a", "--raw", "--temp", "0"]
sys.exit(entry.main(make_llm=Slow))
"""


def start(seconds: float, **streams) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SLOW.format(seconds=seconds)], cwd=REPOSITORY, stdin=subprocess.DEVNULL, **streams)


def read_all(terminal: int) -> bytes:
    """What was written to a terminal, until nobody has it any more."""
    found = b""
    try:
        while data := os.read(terminal, 4096):
            found += data
    except OSError:  # Linux's end of a terminal
        pass
    return found


@pytest.fixture
def terminal():
    """(a terminal's own side, the side for a process)."""
    sides = pty.openpty()
    yield sides
    os.close(sides[0])


def test_a_terminal_shows_loading_and_compiling_and_keeps_warnings_and_the_speed(terminal):
    process = start(0.6, stdout=subprocess.PIPE, stderr=terminal[1])
    os.close(terminal[1])
    shown = read_all(terminal[0])
    assert process.communicate(timeout=60)[0] == b"[a] max 512 t 0\n"
    words = shown.decode().replace(ERASE.decode(), "<").replace("\r\n", "\n")
    loading, compiling = (rf"(<tpllm: {what} \.\.\.( \d+ s)?)+" for what in ("loading fake", "compiling"))
    assert re.fullmatch(rf"{loading}<tpllm: WARNING: a warning\n{loading}{compiling}<tpllm: 0 tokens\n", words)


def test_a_signal_while_it_loads_erases_the_line(terminal):
    process = start(60, stdout=subprocess.DEVNULL, stderr=terminal[1])
    os.close(terminal[1])
    shown = b""
    while b"a warning" not in shown:
        shown += os.read(terminal[0], 4096)
    process.send_signal(signal.SIGINT)
    assert read_all(terminal[0]).endswith(ERASE)
    assert process.wait(timeout=60) == 128 + signal.SIGINT


def test_what_is_no_terminal_shows_neither():
    process = start(0, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.communicate(timeout=60) == (b"[a] max 512 t 0\n", b"tpllm: WARNING: a warning\ntpllm: 0 tokens\n")
