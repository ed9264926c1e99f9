"""Faults on purpose: one of the calls that an engine's work is made of raises, before or after it has done what it does."""
import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import pytest

from tpllm.engine import runner
from tpllm.engine.engine import Engine
from tpllm.engine.executor import LocalExecutor
from tpllm.engine.pages import PagePool, PrefixCache
from tpllm.engine.request import Sequence
from tpllm.engine.rows import Rows
from tpllm.engine.scheduler import Scheduler
from tpllm.tokenizer import Detokenizer

ERRORS = (KeyboardInterrupt, RuntimeError, MemoryError)
WATCHED = {
    jax: ["device_get"], runner: ["pack_chunk", "row_of", "pack_slot"], runner.Runner: ["dispatch", "drop"],
    LocalExecutor: ["run", "start", "step", "decode", "copy_page", "save", "restore", "drop"],
    Scheduler: ["plan"], Rows: ["add", "commit", "release", "_admit", "_reserve", "_preempt", "_leave"],
    PagePool: ["take", "hold", "release", "learn"], PrefixCache: ["find", "remember"],
    Sequence: ["push", "show", "finish"], Detokenizer: ["push", "finish"]}


class Faults:
    """Watches the calls that :data:`WATCHED` names, and those of an engine's programs.

    Attributes:
        names: of the calls since :meth:`arm`, each twice, for an error may come before and after it.
        raised: the name of the call with which one came.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine):
        self.disarm()
        for owner, names in WATCHED.items():
            for name in names:
                monkeypatch.setattr(owner, name, self._watched(getattr(owner, name), name))
        programs = engine.runner.executor.programs
        monkeypatch.setattr(engine.runner.executor, "programs", dataclasses.replace(programs, **{
            field.name: self._watched(getattr(programs, field.name), field.name) for field in dataclasses.fields(programs)}))

    def arm(self, place: int, error: type[BaseException]) -> None:
        """Raise an error at one place of :attr:`names`, counted from now on."""
        self.names, self.raised, self._place, self._error = [], None, place, error

    def disarm(self) -> None:
        """Raise nothing."""
        self.arm(-1, RuntimeError)

    def _watched(self, function: Callable, name: str) -> Callable:
        @functools.wraps(function)
        def call(*args, **options):
            self._pass(name)
            result = function(*args, **options)
            self._pass(name)
            return result
        return call

    def _pass(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) - 1 == self._place:
            self.raised = name
            raise self._error(f"a fault on purpose, in {name}")


def choose_places(names: list[str]) -> Iterator[tuple[int, type[BaseException]]]:
    """One place of each name, and what to raise there."""
    found: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        found.setdefault(name, []).append(place)
    for number, places in enumerate(found.values()):
        yield places[len(places) // 2 - number % 2], ERRORS[number % len(ERRORS)]  # before a call, or after one
