"""Trying a mutant: its tests, run in a copy of the tree that has the fault."""
from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from tools.mutation.copied_tree import BuildError, CopiedTree
from tools.mutation.mutant import Mutant, StaleError

CAUGHT, SURVIVED, STALE, BROKEN, NOT_TRIED = "caught", "SURVIVED", "STALE", "BROKEN", "NOT TRIED"
FAILED = (SURVIVED, STALE, BROKEN, NOT_TRIED)
"""Outcomes that a release may not have."""
NOT_RUN_HERE = "not slow and not oracle and not aot"
TESTS_FAILED, NOTHING_COLLECTED = 1, 5  # pytest's exit codes


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a mutant.

    Attributes:
        mutant: which.
        verdict: one of the constants of this module.
        by: the test that failed, or what else tells of it.
        seconds: that its tests ran, up to the failure.
    """

    mutant: Mutant
    verdict: str
    by: str
    seconds: float


class Trials:
    """Runs tests of faulty trees; those that still run can be stopped from another thread."""

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self.is_stopped = False

    def stop(self) -> None:
        """End every test that runs; later ones are not begun."""
        with self._lock:
            self.is_stopped = True
            for process in self._running:
                _kill(process)

    def of_group(self, tree: CopiedTree, mutants: Sequence[Mutant]) -> Iterator[Outcome]:
        """The outcomes of mutants that one build of the tree serves. First their tests run without a fault: a test that fails then says nothing
        of any."""
        tests = sorted({path for mutant in mutants for path in mutant.tests})
        verdict, by, _ = self._run(tree, None, tests, like=mutants[0])
        if self.is_stopped:
            return
        if verdict != SURVIVED:
            by = f"without the fault: {by}"
            yield from (Outcome(mutant, NOT_TRIED if verdict == NOT_TRIED else BROKEN, by, 0.0) for mutant in mutants)
            return
        for mutant in mutants:
            if not self.is_stopped:
                yield Outcome(mutant, *self._run(tree, mutant, mutant.tests, like=mutant))

    def _run(self, tree: CopiedTree, mutant: Mutant | None, tests: Iterable[str], *, like: Mutant) -> tuple[str, str, float]:
        """(verdict, by, seconds); ``like`` says what has to be built."""
        try:
            with tree.fault(mutant), tree.built_library(like.isa) if like.needs_compiler else contextlib.nullcontext():
                start = time.monotonic()
                verdict, by = self._run_pytest(tree, tests)
                return verdict, by, time.monotonic() - start
        except StaleError as error:
            return STALE, str(error), 0.0
        except (BuildError, OSError) as error:
            return BROKEN, str(error), 0.0

    def _run_pytest(self, tree: CopiedTree, tests: Iterable[str]) -> tuple[str, str]:
        report, printed = (tree.path / "build" / f"mutants.{suffix}" for suffix in ("xml", "txt"))
        printed.parent.mkdir(exist_ok=True)
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", NOT_RUN_HERE, f"--junitxml={report}", *tests]
        with printed.open("wb") as out:
            process = self._start(command, tree, out)
            if process is None:
                return NOT_TRIED, "interrupted"
            try:
                process.wait(self.timeout_s)
            except subprocess.TimeoutExpired:
                return CAUGHT, f"it hung: the tests ran past {self.timeout_s:g} s"
            finally:
                with self._lock:
                    _kill(process)
                    self._running.remove(process)
        if self.is_stopped:
            return NOT_TRIED, "interrupted"
        return _verdict(process.returncode, _read_report(report), printed.read_text(errors="replace"))

    def _start(self, command: Sequence[str], tree: CopiedTree, out: BinaryIO) -> subprocess.Popen | None:
        """A program in a session of its own, whose parts can be ended together; None where none is to be begun any more."""
        with self._lock:
            if self.is_stopped:
                return None
            process = subprocess.Popen(command, cwd=tree.path, env=tree.environment(), stdin=subprocess.DEVNULL, stdout=out,
                                       stderr=subprocess.STDOUT, start_new_session=True)
            self._running.add(process)
            return process


def _kill(process: subprocess.Popen) -> None:
    """With all that it started: its session is its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read_report(path) -> tuple[int, str] | None:
    """(how many tests ran and were not skipped, the first that failed or ""), or None without a report."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return None
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    name = f"{failed[0].get('classname').rpartition('.')[2]}::{failed[0].get('name')}".removeprefix("::") if failed else ""
    return sum(case.find("skipped") is None for case in cases), name


def _verdict(code: int, report: tuple[int, str] | None, printed: str) -> tuple[str, str]:
    if code < 0:
        return CAUGHT, f"it crashed: {signal.Signals(-code).name}"
    if report is None:
        return BROKEN, f"pytest ended with code {code}:\n{printed[-2000:]}"
    num_run, failed = report
    if failed:
        return CAUGHT, failed
    if code == NOTHING_COLLECTED or num_run == 0:
        return NOT_TRIED, "every test was skipped, or none was found"
    return (SURVIVED, "") if code == 0 else (BROKEN, f"pytest ended with code {code}:\n{printed[-2000:]}")
