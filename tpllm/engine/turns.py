"""Turns: one thread at a time uses an engine, threads take turns in the order in which they ask, and no signal interrupts a turn."""
import _signal  # what ``signal`` wraps: the enums that it makes cost ten times as much as the rest of a turn
import bisect
import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = tuple(int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
                if hasattr(signal, name))
"""Signals whose handlers may raise; those of profilers are not among them."""
MAX_ALIKE = 2  # how many of one signal are kept: a second Ctrl-C may mean more than the first, the thousandth tick of a timer does not
LOOK_S = 0.1  # how often a thread in line looks whether a signal has come


class HeldSignals:
    """A section in which signals wait: their handlers are called at its end.

    Python calls a handler between any two bytecodes of the main thread, and most handlers raise, Python's own for Ctrl-C among them. Other threads
    get no signals, and what is no Python function (``SIG_IGN``, ``SIG_DFL``, a handler of C code) stays as it is. Sections may stand within others.
    """

    def __init__(self):
        self._came: list[int] = []
        self._former: dict[int, Callable[..., Any]] = {}
        self._is_held = False

    def __enter__(self) -> "HeldSignals":
        if threading.get_ident() == threading.main_thread().ident:
            try:
                for number in SIGNALS:
                    handler = _signal.getsignal(number)
                    if callable(handler):
                        self._former[number] = handler
                        _signal.signal(number, self._take)
                self._is_held = True
            except BaseException:  # a handler raised that is not replaced yet
                self._put_back()
                raise
        return self

    def __exit__(self, *_) -> None:
        if self._former:
            try:
                self._put_back()
            finally:
                self._is_held = False
                self.deliver()

    @property
    def have_come(self) -> bool:
        """Whether a signal waits."""
        return bool(self._came)

    def deliver(self) -> None:
        """Call the handlers of the signals that have come, in their order; each is called, even where one before it raises."""
        if self._came:
            number = self._came.pop(0)
            try:
                self._former[number](number, None)
            finally:
                self.deliver()

    def _put_back(self) -> None:
        for number, handler in reversed(self._former.items()):
            if _signal.getsignal(number) == self._take:  # else whoever was called meanwhile has chosen another
                _signal.signal(number, handler)

    def _take(self, number: int, frame) -> None:
        if self._is_held:
            if self._came.count(number) < MAX_ALIKE:
                self._came.append(number)
        else:  # it was not put back, because another signal's handler raised just then
            self._former[number](number, frame)


class Turns:
    """A lock that threads get in the order in which they ask for it. Signals wait until a turn is over, and end the wait for one."""

    def __init__(self):
        self._tickets = itertools.count()
        self._line: list[int] = []  # tickets of those who wait, in order
        self._is_taken = False
        self._threads: set[int] = set()  # in line or in their turn; looked at without waiting
        self._has_moved = threading.Condition()

    @property
    def are_mine(self) -> bool:
        """Whether this thread has its turn, or is in line for it: then a finalizer asks, which runs between any two bytecodes."""
        return threading.get_ident() in self._threads

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Wait for a turn, and have it.

        Raises:
            RuntimeError: this thread is in line already.
        """
        if self.are_mine:
            raise RuntimeError("this thread is within a call of this engine; call it again when that one has returned")
        ticket = next(self._tickets)
        with HeldSignals() as signals:
            while not self._stand_in_line(ticket, signals):
                signals.deliver()  # out of the line, for a handler may call the engine; if it returns, the ticket still counts
            try:
                yield
            finally:
                self._end()

    def _stand_in_line(self, ticket: int, signals: HeldSignals) -> bool:
        """Wait for the turn of a ticket and take it; False, and out of the line, where a signal comes first."""
        is_turn = False
        with self._has_moved:
            bisect.insort(self._line, ticket)
            self._threads.add(threading.get_ident())
            try:
                while not is_turn and not signals.have_come:
                    if self._is_taken or self._line[0] != ticket:
                        self._has_moved.wait(LOOK_S)
                    else:
                        self._is_taken = is_turn = True
            finally:
                self._line.remove(ticket)
                if not is_turn:
                    self._threads.discard(threading.get_ident())
                    self._has_moved.notify_all()
        return is_turn

    def _end(self) -> None:
        with self._has_moved:
            self._is_taken = False
            self._threads.discard(threading.get_ident())
            self._has_moved.notify_all()
