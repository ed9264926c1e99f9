"""Which cases of a kernel's test `make test-newest` runs."""
from collections.abc import Iterable
from typing import Any

import pytest


def first_is_newest(cases: Iterable[Any]) -> list[Any]:
    """Parameters of a test, the first of which is also run on the newest jax."""
    first, *others = cases
    return [pytest.param(first, marks=pytest.mark.newest), *others]
