"""A process that runs tasks one after the other, and may die of one.

A kernel that was never run before can hang a GPU, or leave a process with an error that every later call of CUDA repeats. So nothing of the
benchmark computes in the process that keeps its results: tasks run in workers, which are ended at a time limit and started anew. A task is
a function, ``"module:function"``, with a dot before a module of this package; its arguments and its result are JSON, a line each way.
"""
import contextlib
import importlib
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = "benchmarks.gpu"
LOG_TAIL = 2000  # characters of what a worker that died wrote
FATAL = ("CUDA_ERROR", "CUDA error", "JaxRuntimeError", "XlaRuntimeError", "AcceleratorError", "OutOfMemoryError")
"""What in an error's text means that the process must go: its device, or memory on it, is not as it was."""


class TaskError(Exception):
    """A task failed; ``details`` is its traceback, or the end of the worker's log."""

    def __init__(self, message: str, details: str = ""):
        super().__init__(message)
        self.details = details


class Worker:
    """Starts its process with the first task.

    Args:
        name: for errors.
        environment: added to this process's.

    Attributes:
        generation: counts the processes: what a task left in an earlier one is gone.
    """

    def __init__(self, name: str, environment: Mapping[str, str]):
        self.name, self.generation = name, 1
        self._environment, self._process, self._log = {**os.environ, **environment}, None, None
        self._pending: str | None = None

    def call(self, task: str, *, timeout_s: float, **arguments: Any) -> Any:
        """The result of a task.

        Raises:
            TaskError: it failed, the process died of it, or it took too long.
        """
        self.start(task, **arguments)
        return self.finish(timeout_s=timeout_s)

    def start(self, task: str, **arguments: Any) -> None:
        """Begin a task; :meth:`finish` waits for it."""
        if self._process is None:
            self._launch()
        self._pending = task
        with contextlib.suppress(BrokenPipeError):  # the process died between two tasks: finish() says so
            self._process.stdin.write(json.dumps({"task": task, "arguments": arguments}).encode() + b"\n")
            self._process.stdin.flush()

    def finish(self, *, timeout_s: float) -> Any:
        """The result of the task that was started; raises as :meth:`call` does."""
        task, self._pending = self._pending, None
        line = self._read_line(time.monotonic() + timeout_s)
        if line is None:
            self.stop()
            raise TaskError(f"{task} took more than {timeout_s:.0f} s; its process was ended")
        if not line:
            code, log = self._process.wait(), self._log_tail()
            self.stop()
            raise TaskError(f"the process of {task} ended with code {code}", log)
        answer = json.loads(line)
        if "error" in answer:
            if any(word in answer["error"] for word in FATAL):
                self.stop()
            raise TaskError(answer["error"], answer["details"])
        return answer["result"]

    @property
    def is_running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None

    @property
    def is_busy(self) -> bool:
        """Whether a task was started and not finished."""
        return self._pending is not None

    def stop(self) -> None:
        """End the process, and those that it started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._log.close()
        self._process, self._pending = None, None
        self.generation += 1

    def _launch(self) -> None:
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen([sys.executable, "-m", f"{PACKAGE}.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=self._log, bufsize=0, cwd=ROOT, env=self._environment, start_new_session=True)

    def _read_line(self, deadline: float) -> bytes | None:
        """A line; empty where the process ended; None where there was none in time."""
        parts = []
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not parts or not parts[-1].endswith(b"\n"):
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    return None
                parts.append(self._process.stdout.read(1 << 16))
                if not parts[-1]:
                    return b""
        return b"".join(parts)

    def _log_tail(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(size - LOG_TAIL, 0))
        return self._log.read().decode(errors="replace")


def serve() -> None:
    """Answer tasks from standard input until it ends. What tasks print goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            module, _, function = request["task"].partition(":")
            answer = {"result": getattr(importlib.import_module(module, PACKAGE), function)(**request["arguments"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "details": traceback.format_exc()}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    serve()
