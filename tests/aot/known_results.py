"""Facts of compiled programs in committed files, so that what is known need not be compiled again."""
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax

from tests.aot.program_keys import Program, identify
from tests.aot.stored_facts import from_json, to_json
from tpllm.aot.report import ProgramFacts
from tpllm.errors import MemoryNeedError

FOLDER = pathlib.Path(__file__).parent / "results"
NUM_COMPARED = 3
REFUSALS = {"MemoryNeedError": MemoryNeedError, "JaxRuntimeError": jax.errors.JaxRuntimeError}
Compiler = Callable[[jax.stages.Lowered], ProgramFacts]


class DifferenceError(AssertionError):
    """A compiler says something else than the file."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A program whose facts a test asked for."""

    program: Program
    lowered: jax.stages.Lowered
    test: str


class Results:
    """The facts of programs: from their file where they are known, else from their compiler.

    Args:
        folder: of the files, one for each compiler.
        compile_program: asks the compiler.
        compiles_all: whether known programs are compiled too, and compared.
        writes: whether new entries are written to the files.
        seed: draws the known programs that :meth:`compare_some` compiles.
    """

    def __init__(self, folder: pathlib.Path, compile_program: Compiler, *, compiles_all: bool = False, writes: bool = True, seed: int = 0):
        self.seed = seed
        self.new: list[Question] = []
        self.compared: list[Program] = []
        self._folder, self._compile, self._compiles_all, self._writes = folder, compile_program, compiles_all, writes
        self._files: dict[str, dict[str, dict[str, Any]]] = {}  # compiler -> key -> entry
        self._asked: set[str] = set()
        self._drawn: list[Question] = []
        self._lock = threading.Lock()

    def facts(self, lowered: jax.stages.Lowered) -> ProgramFacts:
        """What the program's compiler made of it, in place of compiling it.

        Raises:
            MemoryNeedError, JaxRuntimeError: the compiler refuses the program.
            DifferenceError: the program was compiled although it is known, and is not what the file says.
        """
        with self._lock:
            program = identify(lowered)
            known = None if program is None else self._entries(program.compiler).get(program.key)
        if program is None:
            return self._compile(lowered)
        question = Question(program, lowered, os.environ.get("PYTEST_CURRENT_TEST", "").partition(" (")[0])
        if known is None:
            known = self._add(question)
        elif program.key not in self._asked:
            if self._compiles_all:
                self._compare(question, self._compile)
            else:
                self._draw(question)
        self._asked.add(program.key)
        return _facts_or_refusal(known)

    def compare_some(self, compile_program: Compiler) -> None:
        """Compile some of the known programs that were asked for, drawn by the seed.

        Raises:
            DifferenceError: one is not what the file says.
        """
        drawn, self._drawn = self._drawn, []
        for question in drawn:
            self._compare(question, compile_program)

    def prune(self) -> list[str]:
        """Remove the entries that nothing asked for from the files that were read; what they are called."""
        removed = []
        for compiler, entries in self._files.items():
            unasked = [key for key in entries if key not in self._asked]
            removed += [f"{entries[key]['program']} ({compiler}, {key})" for key in unasked]
            if unasked:
                self._save(compiler, without=unasked)
        return removed

    @property
    def num_asked(self) -> int:
        """Different programs that tests asked for."""
        return len(self._asked)

    def path(self, compiler: str) -> pathlib.Path:
        """The file of one compiler's results."""
        return self._folder / f"{compiler}.jsonl"

    def _entries(self, compiler: str) -> dict[str, dict[str, Any]]:
        if compiler not in self._files:
            self._files[compiler] = self._read(compiler)
        return self._files[compiler]

    def _read(self, compiler: str) -> dict[str, dict[str, Any]]:
        lines = self.path(compiler).read_text().splitlines() if self.path(compiler).exists() else []
        return {entry["key"]: entry for entry in map(json.loads, lines)}

    def _add(self, question: Question) -> dict[str, Any]:
        entry = _compiled(question, self._compile)
        with self._lock:
            self._entries(question.program.compiler)[question.program.key] = entry
            self.new.append(dataclasses.replace(question, lowered=None))
            if self._writes:
                self._save(question.program.compiler)
        return entry

    def _draw(self, question: Question) -> None:
        """Keeps those of the lowest ranks, so that neither the order of tests nor their number matters."""
        with self._lock:
            self._drawn.append(question)
            self._drawn.sort(key=lambda one: hashlib.sha256(f"{self.seed} {one.program.key}".encode()).digest())
            del self._drawn[NUM_COMPARED:]

    def _compare(self, question: Question, compile_program: Compiler) -> None:
        program, entry = question.program, _compiled(question, compile_program)
        self.compared.append(program)
        known = self._entries(program.compiler)[program.key]
        if entry != known:
            raise DifferenceError(f"{self.path(program.compiler).name} does not say what the compiler says of {program.name}, asked for by "
                                  f"{question.test} (key {program.key}, seed {self.seed}): {_differences(known, entry)}. If the compiler is right, "
                                  "remove the line of this key, run `make test-aot` and commit the file")

    def _save(self, compiler: str, without: Collection[str] = ()) -> None:
        """Writes the file, with what other processes have added since it was read."""
        self._folder.mkdir(exist_ok=True)
        with _locked(self._folder):
            entries = self._read(compiler) | self._files[compiler]
            self._files[compiler] = {key: entry for key, entry in entries.items() if key not in without}
            lines = sorted(self._files[compiler].values(), key=lambda entry: (entry["program"], entry["key"]))
            beside = self.path(compiler).with_suffix(".new")
            beside.write_text("".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines))
            beside.replace(self.path(compiler))


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _compiled(question: Question, compile_program: Compiler) -> dict[str, Any]:
    entry = {"program": question.program.name, "key": question.program.key}
    try:
        return entry | to_json(compile_program(question.lowered))
    except (MemoryNeedError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryNeedError) and not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise  # a fault of the compiler or of this machine, and no answer
        return entry | {"refusal": [type(error).__name__, str(error).splitlines()[0]]}


def _facts_or_refusal(entry: dict[str, Any]) -> ProgramFacts:
    if "refusal" in entry:
        kind, message = entry["refusal"]
        raise REFUSALS[kind](message)
    return from_json(entry)


def _differences(known: Any, compiled: Any, path: str = "") -> str:
    """What two JSON values differ in, as ``memory.temporary_bytes 1 in the file, 2 compiled``."""
    if isinstance(known, dict) and isinstance(compiled, dict):
        parts = [_differences(known.get(key), compiled.get(key), f"{path}.{key}".strip(".")) for key in sorted(known.keys() | compiled.keys())]
        return ", ".join(filter(None, parts))
    return "" if known == compiled else f"{path} {json.dumps(known)} in the file, {json.dumps(compiled)} compiled"
