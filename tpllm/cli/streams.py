"""Standard output and standard error that may be closed or full, or whose reader may have gone.

What is said on standard error is for whoever listens: a command goes on when it cannot be said. What is printed on standard output is the command's
result: where it cannot be written the command fails, once, and with one line. A closed descriptor is opened on nothing, so that no file of the
command's own gets its number and, with it, what libraries write there.
"""
import contextlib
import io
import os
import sys
from collections.abc import Iterator

STDIN, STDOUT, STDERR = 0, 1, 2
# That standard error is closed is not to be noticed; that standard output is, at the first write: to a descriptor for reading it fails.
MODES = {STDIN: os.O_RDONLY, STDOUT: os.O_RDONLY, STDERR: os.O_WRONLY}


class OutputFailed(OSError):  # noqa: N818
    """Standard output cannot be written to; its ``strerror`` says why. Not raised where its reader has gone: that is a ``BrokenPipeError``."""


class _Output(io.RawIOBase):
    """One of the process's descriptors.

    Attributes:
        fd: its number.
    """

    fd: int

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.fd

    def isatty(self) -> bool:
        return os.isatty(self.fd)


class _Stdout(_Output):
    """Standard output. The first write that fails raises; later ones are taken and lost, for there is nothing new to say at the end."""

    fd, has_failed = STDOUT, False

    def write(self, data) -> int:
        if self.has_failed:
            return len(data)
        try:
            return os.write(STDOUT, data)
        except BrokenPipeError:
            self.has_failed = True
            raise
        except OSError as error:
            self.has_failed = True
            raise OutputFailed(error.errno, error.strerror) from None


class Stderr(_Output):
    """Standard error; what cannot be written is lost.

    Attributes:
        around_write: makes a context manager for each write: within it no status line stands on the terminal.
    """

    fd = STDERR
    around_write = contextlib.nullcontext

    def write(self, data) -> int:
        with self.around_write(), contextlib.suppress(OSError):
            return os.write(STDERR, data)
        return len(data)


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """While the block runs, ``sys.stdout`` and ``sys.stderr`` are as the module says, where they are the process's own; at its end all is written.

    Raises:
        OutputFailed, BrokenPipeError: at a write or at the end, standard output cannot be written to.
    """
    _open_closed_descriptors()
    former = sys.stdin, sys.stdout, sys.stderr
    if sys.stdin is None:
        sys.stdin = open(STDIN, encoding="utf-8", closefd=False)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(_Stdout(), former[1], errors="strict", is_line_buffered=os.isatty(STDOUT))
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(Stderr(), former[2], errors="backslashreplace", is_line_buffered=True)
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        finally:
            sys.stdin, sys.stdout, sys.stderr = former


def _text(raw: io.RawIOBase, former: io.TextIOBase | None, *, errors: str, is_line_buffered: bool) -> io.TextIOWrapper:
    """A text stream over ``raw`` with the encoding of the one it stands for."""
    if former is not None:
        with contextlib.suppress(OSError):
            former.flush()
    encoding = getattr(former, "encoding", None) or "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, getattr(former, "errors", None) or errors, line_buffering=is_line_buffered)


def _open_closed_descriptors() -> None:
    for fd, mode in MODES.items():
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, mode)  # gets the lowest number that is free: this one
