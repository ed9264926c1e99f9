"""SIGTERM and SIGINT end a job where it may be interrupted, never in the middle of a write."""
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_S = 20.0
LAST_RITES_S = 5.0


class StopRequested(BaseException):
    """Raised in the main thread by a signal; not an ``Exception``, so that nothing on the way takes it for a failure.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class StopSignals:
    """Turns the first signal into :class:`StopRequested`, as soon as nothing holds it back, and ends its ``with`` block by it.

    A second signal ends the process at once.

    Should the main thread sit in a long call (a compilation, a step on a large model), a watchdog ends the process after the grace period:
    a job's folder can be resumed whenever its process dies, so it only syncs what is finished.

    Attributes:
        number: the signal that came, or None.
    """

    def __init__(self, *, grace_s: float = GRACE_S):
        self.number: int | None = None
        self._grace_s = grace_s
        self._num_holds = 0
        self._last_rites: Callable[[], None] = lambda: None
        self._watchdog: threading.Timer | None = None

    def __enter__(self) -> "StopSignals":
        # Python allows handlers in the main thread only; a job run in another one is stopped by whoever started it.
        is_main = threading.current_thread() is threading.main_thread()
        self._former = {number: signal.signal(number, self._handle) for number in SIGNALS} if is_main else {}
        return self

    def __exit__(self, kind, *_) -> bool:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self._watchdog:
            self._watchdog.cancel()
        return kind is StopRequested

    def before_exit(self, function: Callable[[], None]) -> None:
        """What the watchdog calls before it ends the process."""
        self._last_rites = function

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A section that a signal does not interrupt; the stop follows at its end."""
        self._num_holds += 1
        try:
            yield
        finally:
            self._num_holds -= 1
        self.check()

    def check(self) -> None:
        """Raise :class:`StopRequested` if a signal has come: also where the first raise was swallowed on its way."""
        if self.number is not None and not self._num_holds:
            raise StopRequested(self.number)

    def _handle(self, number: int, _frame) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        self._watchdog = threading.Timer(self._grace_s, self._end)
        self._watchdog.daemon = True
        self._watchdog.start()
        self.check()

    def _end(self) -> None:
        rites = threading.Thread(target=self._last_rites, daemon=True)  # the main thread may be stuck in the very lock that they need
        rites.start()
        rites.join(LAST_RITES_S)
        os._exit(128 + self.number)
