"""Steps of the Makefile: one line that says what and how long; everything that the command printed where it fails."""
import re
import sys

from tools import step


def test_a_step_is_one_line_with_its_seconds(capsys):
    assert step.main(["say hello", sys.executable, "-c", "print('hello')"]) == 0
    assert re.fullmatch(r"make: say hello \.\.\. \d+ s\n", capsys.readouterr().out)


def test_a_step_that_fails_shows_what_it_printed_and_gives_its_exit_code(capsys):
    script = "import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)"
    assert step.main(["fail", sys.executable, "-u", "-c", script]) == 3
    assert capsys.readouterr().out == "make: fail ... failed with code 3\none\ntwo\n"


def test_a_terminal_sees_the_last_line_while_the_step_runs(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert step.main(["work", sys.executable, "-c", "print('[1/2] compiling')"]) == 0
    out = capsys.readouterr().out
    assert "s: [1/2] compiling" in out
    assert re.fullmatch(r"make: work \.\.\. \d+ s\n", out.rpartition("\033[K")[2])
