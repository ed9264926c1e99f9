"""What a command is doing, on one line of the terminal that disappears when there is something else to show."""
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

from tpllm.cli.entry import say_at_the_end
from tpllm.cli.streams import STDERR, Stderr

ERASE = b"\r\x1b[K"
NARROW = 80  # columns of a terminal that does not tell


class StatusLine:
    """A line on standard error, where that is a terminal: a text, and how many seconds ago it was set.

    It is erased before anything else is written to ``sys.stderr``, at :meth:`clear`, at the end of the ``with`` block, and when a signal ends the
    process. Before text goes to standard output, call :meth:`clear`.

    Args:
        text: such as ``"loading demo"``.
    """

    def __init__(self, text: str):
        self._ended, self._lock, self._is_drawn = threading.Event(), threading.RLock(), False
        self.say(text)
        raw = getattr(getattr(sys.stderr, "buffer", None), "raw", None)
        self._stderr = raw if isinstance(raw, Stderr) and raw.isatty() else None
        self._thread = threading.Thread(target=self._redraw, daemon=True)

    def __enter__(self) -> "StatusLine":
        if self._stderr is not None:
            self._stderr.around_write = self._erased
            say_at_the_end(ERASE)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.clear()

    def say(self, text: str) -> None:
        """Show another text."""
        self._text, self._since = text, time.monotonic()

    def clear(self) -> None:
        """Erase the line for good."""
        if self._stderr is not None and not self._ended.is_set():
            self._ended.set()
            self._thread.join()
            with self._erased():
                del self._stderr.around_write
            say_at_the_end(b"")

    def _redraw(self) -> None:
        while not self._ended.is_set():
            seconds = int(time.monotonic() - self._since)
            with self._lock, contextlib.suppress(OSError):
                line = f"tpllm: {self._text} ..." + (f" {seconds} s" if seconds else "")
                self._is_drawn = True
                os.write(STDERR, ERASE + line[:(os.get_terminal_size(STDERR).columns or NARROW) - 1].encode(errors="replace"))
            self._ended.wait(0.5)

    @contextlib.contextmanager
    def _erased(self) -> Iterator[None]:
        with self._lock:
            if self._is_drawn:
                self._is_drawn = False
                with contextlib.suppress(OSError):
                    os.write(STDERR, ERASE)
            yield
