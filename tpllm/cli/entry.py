"""Where the process ``tpllm`` begins. From its first line a signal ends it at once with the right exit code: what it imports next takes seconds, and
a ``KeyboardInterrupt`` in the middle of an import can be lost, or leave a traceback. Whatever is written meanwhile is written so that it may end at
any moment.
"""
import atexit
import contextlib
import os
import signal
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM)
is_at_once = False
"""Whether signals end the process at once."""
last_words = b""
"""What is written to standard error before such an end."""


def main(**options) -> int:
    """Run the command line of this process; ``options`` are those of :func:`tpllm.cli.main.main`. Returns the exit code."""
    atexit.register(_ignore_signals)
    end_at_once()
    from tpllm.cli.main import main as run
    code = run(**options)
    for number in SIGNALS:  # the work is done, whatever comes while the interpreter closes down
        signal.signal(number, lambda *_: os._exit(code))
    return code


def end_at_once() -> None:
    """From here on SIGINT and SIGTERM end the process with 128 + their number."""
    global is_at_once
    is_at_once = True
    for number in SIGNALS:
        signal.signal(number, _end)


def say_at_the_end(words: bytes) -> None:
    """Before a signal ends the process at once, write ``words`` to standard error: they erase a status line."""
    global last_words
    last_words = words


def raise_interrupts() -> None:
    """From here on Ctrl-C raises ``KeyboardInterrupt``, as a command needs that has something to clean up or goes on after it; nothing changes where
    the command line is called from Python."""
    global is_at_once
    if is_at_once:
        is_at_once = False
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, _) -> None:
    with contextlib.suppress(OSError):
        os.write(2, last_words)
    os._exit(128 + number)


def _ignore_signals() -> None:
    """The last that the interpreter does in Python. Then it takes its handlers away, and a signal while it takes modules down, which is slow,
    would end a process that has done all its work as if it had not."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
