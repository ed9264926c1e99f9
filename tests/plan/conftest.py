"""Devices of topologies that the tests of this folder only read the places of."""
import dataclasses

import pytest


@dataclasses.dataclass(frozen=True)
class Place:
    """A device as a topology describes it."""

    device_kind: str
    coords: tuple[int, int, int] = (0, 0, 0)


@pytest.fixture
def places():
    """Makes the devices of a slice: its kind and sides -> places."""
    def make(kind: str, *sides: int) -> list[Place]:
        x, y, z = (*sides, 1, 1)[:3]
        return [Place(kind, (i, j, k)) for k in range(z) for j in range(y) for i in range(x)]
    return make
