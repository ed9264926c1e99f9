"""Runs one step of the Makefile on one line: what it does, and how long it took.

    python tools/step.py "install the packages" pip install -e .

On a terminal the line shows the seconds and the last line that the command printed. All that it printed is shown if it fails; the exit code is the
command's.
"""
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run ``arguments[1:]`` as the step ``arguments[0]``; returns the exit code of the command."""
    what, *command = arguments
    begin = f"make: {what} ... "
    print(begin, end="", flush=True)
    start, lines = time.monotonic(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
        for line in process.stdout:
            lines.append(line)
            if sys.stdout.isatty():
                shown = f"{begin}{time.monotonic() - start:.0f} s: {line.strip()}"
                print(f"\r\033[K{shown[:shutil.get_terminal_size().columns - 1]}", end="", flush=True)
    if sys.stdout.isatty():
        print(f"\r\033[K{begin}", end="")
    print(f"{time.monotonic() - start:.0f} s" if process.returncode == 0 else f"failed with code {process.returncode}")
    if process.returncode:
        sys.stdout.writelines(lines)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
