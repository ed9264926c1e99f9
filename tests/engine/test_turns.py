"""Turns: one thread at a time, in the order in which they ask; and signals, which wait."""
import contextlib
import os
import signal
import threading
import time

import pytest

from tpllm.engine import turns
from tpllm.engine.turns import HeldSignals, Turns


def interrupt(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def handler():
    """Sets a handler of a signal for one test."""
    former = {}

    def install(function, number=signal.SIGINT):
        former.setdefault(number, signal.signal(number, function))
    yield install
    for number, function in former.items():
        signal.signal(number, function)


@contextlib.contextmanager
def noting(steps: list[str], name: str):
    steps.append(f"{name} begins")
    yield
    steps.append(f"{name} ends")


def test_ctrl_c_waits_until_the_section_is_over():
    former, steps = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), HeldSignals(), noting(steps, "section"):
        interrupt()
    assert steps == ["section begins", "section ends"]
    assert signal.getsignal(signal.SIGINT) is former


def test_whatever_handler_there_is_gets_every_signal_in_order_and_what_it_raises_comes_out(handler):
    came, numbers = [], [signal.SIGALRM, signal.SIGINT, signal.SIGTERM]

    def stop(number, frame):
        came.append(number)
        raise TimeoutError(number)
    for number in numbers:
        handler(stop, number)
    with pytest.raises(TimeoutError), HeldSignals(), noting(came, "section"):
        [interrupt(number) for number in numbers]
    assert came == ["section begins", "section ends", *numbers]
    assert signal.getsignal(signal.SIGALRM) is stop


def test_a_handler_that_raises_nothing_is_called_and_the_program_goes_on(handler):
    came = []
    handler(lambda number, frame: came.append(number))
    with HeldSignals():
        interrupt()
    assert came == [signal.SIGINT]


def test_sections_within_sections_hold_signals_until_the_outermost_ends():
    steps = []
    with pytest.raises(KeyboardInterrupt), HeldSignals(), noting(steps, "outer"):
        with HeldSignals(), noting(steps, "inner"):
            interrupt()
    assert steps == ["outer begins", "inner begins", "inner ends", "outer ends"]


def test_an_ignored_signal_and_one_of_c_code_stay_what_they_are(handler, monkeypatch):
    handler(signal.SIG_IGN)
    with HeldSignals():
        interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    monkeypatch.setattr(turns._signal, "getsignal", lambda number: None)
    monkeypatch.setattr(turns._signal, "signal", lambda *_: pytest.fail("a handler of C code cannot be put back"))
    with HeldSignals():
        pass


def test_a_handler_chosen_within_the_section_stays(handler):
    def other(number, frame):
        raise AssertionError
    handler(signal.default_int_handler)
    with HeldSignals():
        signal.signal(signal.SIGINT, other)
    assert signal.getsignal(signal.SIGINT) is other


def test_an_error_in_the_section_is_told_beside_the_signal():
    def fail():
        interrupt()
        raise RuntimeError("within")
    with pytest.raises(KeyboardInterrupt) as caught, HeldSignals():
        fail()
    assert "within" in str(caught.value.__context__)


def test_other_threads_hold_nothing(handler):
    handler(signal.default_int_handler)
    seen = []

    def look():
        with HeldSignals():
            seen.append(signal.getsignal(signal.SIGINT))
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_threads_get_their_turns_in_the_order_in_which_they_asked():
    line, order = Turns(), []

    def work(index):
        for _ in range(20):
            with line.take():
                order.append(index)
    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    with line.take():
        for number, thread in enumerate(threads):
            thread.start()
            while len(line._line) <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order[:6] == list(range(6))
    assert [order.count(index) for index in range(6)] == [20] * 6


def test_a_thread_that_asks_within_its_turn_is_told_and_not_stuck():
    line = Turns()
    with line.take():
        assert line.are_mine
        with pytest.raises(RuntimeError, match="within a call of this engine"), line.take():
            pytest.fail("two turns at a time")
    assert not line.are_mine
    with line.take():
        pass


def test_ctrl_c_ends_the_wait_for_a_turn_and_the_line_goes_on(monkeypatch):
    monkeypatch.setattr(turns, "LOOK_S", 0.01)
    line, is_held, may_end = Turns(), threading.Event(), threading.Event()

    def hold():
        with line.take():
            is_held.set()
            may_end.wait(30)
    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait(30)
    timer = threading.Timer(0.05, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt), line.take():
        pytest.fail("it has no turn yet")
    may_end.set()
    thread.join()
    with line.take():
        pass
    assert not line._line


def test_a_signal_whose_handler_returns_takes_nobody_out_of_the_order(handler):
    line, order, came = Turns(), [], []

    def note(number, frame):
        came.append(number)
        assert not line.are_mine, "a handler may call the engine"
    handler(note)

    def work(name):
        with line.take():
            order.append(name)

    def end_turn_later(is_held):
        with line.take():
            is_held.set()
            while not line._line:
                time.sleep(0.001)
            later = threading.Thread(target=work, args=("later",))
            later.start()
            while len(line._line) < 2:
                time.sleep(0.001)
            interrupt()
            while not came:
                time.sleep(0.001)
        later.join()
    is_held = threading.Event()
    first = threading.Thread(target=end_turn_later, args=(is_held,))
    first.start()
    is_held.wait(30)
    work("main")
    first.join()
    assert (order, came) == (["main", "later"], [signal.SIGINT])


def test_ctrl_c_that_came_while_a_turn_ran_comes_out_of_it_and_others_follow():
    line = Turns()
    with pytest.raises(KeyboardInterrupt), line.take():
        interrupt()
    thread = threading.Thread(target=lambda: line.take().__enter__())
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
