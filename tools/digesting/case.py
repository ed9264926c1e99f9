"""One thing that digests are taken of."""
from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True)
class Case:
    """What one run of code gives digests of.

    Attributes:
        name: its part, a slash, and what it is; digests' names begin with it.
        run: takes an empty folder to work in, and gives digests by what follows the case's name and a slash.
        environment: variables that the process must have been started with.
    """

    name: str
    run: Callable[[pathlib.Path], Mapping[str, str]]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def runs_here(self) -> bool:
        """Whether this process was started with its variables."""
        return all(os.environ.get(name) == value for name, value in self.environment.items())
