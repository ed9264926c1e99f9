"""A signal in the middle of an import ends the process with its code, also where the import would swallow an exception."""
import signal
import subprocess
import sys

import pytest

from tests.jobs.fake_job_process import REPOSITORY
from tpllm.cli import entry

SWALLOWS = """
import os, sys
from tpllm.cli import entry
def import_engine(*_, **__):
    try:
        os.kill(os.getpid(), {number})
        import tpllm.jobs.config
    except BaseException:
        pass
    raise ValueError("the signal was lost")
sys.argv[1:] = ["generate", "--model", "fake", "--prompt", "a"]
sys.exit(entry.main(make_llm=import_engine))
"""
LATE = """
import atexit, os, sys
from tpllm.cli import entry
atexit.register(lambda: os.kill(os.getpid(), {number}))
sys.argv[1:] = {words}
sys.exit(entry.main())
"""


LAST = """
import os, sys
from tpllm.cli import entry
class Last:
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, {number})
last = Last()
sys.argv[1:] = {words}
sys.exit(entry.main())
"""


def run(script: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_an_import_is_not_lost_and_leaves_no_traceback(number):
    assert run(SWALLOWS.format(number=int(number))) == (128 + number, "", "")


@pytest.mark.parametrize(("words", "code"), [(["job", "status", "none"], 2), (["completion", "bash"], 0), (["--frobnicate"], 2), (["--version"], 0)])
def test_a_signal_while_the_interpreter_closes_down_changes_no_exit_code(words, code):
    for script, number in ((LATE, signal.SIGINT), (LAST, signal.SIGINT), (LAST, signal.SIGTERM)):
        found, out, _ = run(script.format(number=int(number), words=words))
        assert found == code
        assert bool(out) == (code == 0)


def test_the_handlers_of_who_calls_the_command_line_from_python_stay_as_they_are():
    former = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, handler := lambda *_: None)
    try:
        entry.raise_interrupts()
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, former)
