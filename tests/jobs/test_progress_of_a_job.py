"""Progress is a bar on a terminal and plain lines elsewhere."""
import io

import pytest

from tpllm.jobs import progress
from tpllm.jobs.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_plain_lines_come_every_few_seconds_with_rows_rate_and_time_left(clock):
    stream = io.StringIO()
    shown = Progress(100, 10, stream)
    shown.begin()
    for number in range(1, 12):
        clock.now = float(number)
        shown.advance(20, is_error=number == 3)
    shown.close()
    assert stream.getvalue().splitlines() == [
        "tpllm: 100 rows, 10 finished before",
        "tpllm: 15/100 rows, 1 failed, 20.0 tokens/s, 1:25 left",
        "tpllm: 20/100 rows, 1 failed, 20.0 tokens/s, 1:20 left",
        "tpllm: 21/100 rows, 1 failed, 20.0 tokens/s, 1:19 left",
    ]


def test_the_last_line_is_not_said_twice(clock):
    stream = io.StringIO()
    shown = Progress(2, 1, stream)
    shown.begin()
    clock.now = 6.0
    shown.advance(20, is_error=False)
    shown.close()
    assert stream.getvalue().count("2/2 rows") == 1


def test_hours_are_shown_as_such(clock):
    shown = Progress(2, 0, io.StringIO())
    shown.begin()
    clock.now = 3725.0
    shown.advance(0, is_error=False)
    assert shown.line() == "1/2 rows, 0.0 tokens/s, 1:02:05 left"


def test_a_terminal_gets_a_bar_with_rows_and_rate_and_first_what_is_waited_for():
    stream, texts = Terminal(), []
    shown = Progress(3, 1, stream, model="a/[demo]")
    for step in (lambda: None, shown.begin, *[lambda: shown.advance(5, is_error=False)] * 2, shown.close):
        step()
        texts.append(stream.getvalue())
    assert "loading a/[demo]" in texts[0]
    assert "compiling" not in texts[0]
    assert "compiling" in texts[1]
    assert "tokens/s" not in texts[1]
    assert "3/3" in texts[-1]
    assert "tokens/s" in texts[-1]


def test_a_model_that_cannot_be_loaded_leaves_no_line_of_rows():
    stream = io.StringIO()
    Progress(3, 1, stream, model="demo").close()
    assert stream.getvalue() == ""


def test_a_job_goes_on_when_nobody_reads_its_progress():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError
    shown = Progress(3, 0, Gone())
    shown.begin()
    shown.advance(5, is_error=False)
    shown.close()
    assert shown.num_done == 1
