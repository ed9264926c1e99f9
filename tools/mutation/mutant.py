"""One-line faults and where they are written down: what to change, and which test files have to notice."""
from __future__ import annotations

import dataclasses
import pathlib
import textwrap
import tomllib

BY_HAND, DRAWN, EQUIVALENT = "by_hand.toml", "drawn.toml", "equivalent.toml"
CSRC = "tpllm/native/csrc/"


class StaleError(ValueError):
    """A mutant that no longer fits the tree."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A fault.

    Attributes:
        name: unique.
        file: from the root of the tree.
        old: the line as it is now, or several where one is not unique; indentation that all of them share does not count.
        new: the same lines with one of them changed; a statement that is removed becomes ``pass``, in C++ ``;``.
        tests: files or folders of tests, of which one has to fail.
        harm: what users would see of it.
        drawn: seed and operator, of one that was drawn.
        isa: of a C++ one, the instruction set to build besides the portable one, which always is.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    harm: str = ""
    drawn: str = ""
    isa: str = ""

    @property
    def needs_compiler(self) -> bool:
        """Whether the native library has to be built again for it."""
        return self.file.startswith(CSRC)

    def applied(self, root: pathlib.Path) -> str:
        """The text of its file in the tree below ``root``, with the fault.

        Raises:
            StaleError: the file, the old lines (exactly once) or a test file is not there, or old and new do not differ in one line.
        """
        old, new = (textwrap.dedent(text).strip("\n").split("\n") for text in (self.old, self.new))
        if len(old) != len(new) or sum(a != b for a, b in zip(old, new, strict=True)) != 1:
            raise StaleError(f"{self.name}: old and new have to differ in exactly one line")
        missing = [path for path in (self.file, *self.tests) if not (root / path).exists()]
        if missing or not self.tests:
            raise StaleError(f"{self.name}: {missing[0] if missing else 'a test file'} is not there")
        lines = (root / self.file).read_text("utf-8").split("\n")
        places = [first for first in range(len(lines) - len(old) + 1) if _dedented(lines[first:first + len(old)]) == old]
        if len(places) != 1:
            raise StaleError(f"{self.name}: its old line is in {self.file} {len(places)} times, not once: {old[0].strip()}")
        first = places[0]
        indent = lines[first][:len(lines[first]) - len(old[0])]
        lines[first:first + len(old)] = [indent + line if line else line for line in new]
        return "\n".join(lines)


def _dedented(lines: list[str]) -> list[str]:
    return textwrap.dedent("\n".join(lines)).split("\n")


def read_mutants(folder: pathlib.Path) -> list[Mutant]:
    """The mutants that the data files of a folder hold, those by hand first.

    Raises:
        ValueError: an entry with a missing or unknown key, or two of one name.
    """
    mutants: list[Mutant] = []
    for file in (BY_HAND, DRAWN):
        if not (folder / file).exists():
            continue
        for entry in tomllib.loads((folder / file).read_text("utf-8"))["mutant"]:
            try:
                mutants.append(Mutant(**{**entry, "tests": tuple(entry["tests"])}))
            except (KeyError, TypeError) as error:
                raise ValueError(f"{folder / file}: the entry {entry.get('name')!r}: {error}") from None
    names = [mutant.name for mutant in mutants]
    if twins := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{folder}: two mutants have the name {min(twins)!r}")
    return mutants
