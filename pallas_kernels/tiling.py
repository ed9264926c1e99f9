"""What kernels are made for, and which tiles they take there.

A kernel's tiles are a frozen dataclass. Its module lists candidates, the best known first; those that do not fit into a device's memory on the chip
are never launched; :func:`tune` measures the rest on a device and stores the fastest.
"""
import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax

Tiles = TypeVar("Tiles")
KIB = 1024
ON_CHIP_BYTES = {"NVIDIA H100": 227 * KIB, "NVIDIA H200": 227 * KIB, "TPU v5 lite": 128 * KIB**2, "TPU v5": 64 * KIB**2, "TPU v6": 128 * KIB**2}
"""By the beginning of a device's kind: shared memory that a block of a GPU can have, or vector memory of a TPU's core; of more than one, the longest."""
HOPPER = (9, 0)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a kernel is compiled for; hashable.

    Attributes:
        platform: ``"cpu"``, ``"gpu"``, ``"tpu"``, or a plug-in's.
        kind: as JAX names it: ``"NVIDIA H200"``, ``"TPU v5 lite"``.
        capability: (major, minor) compute capability of an NVIDIA GPU; None elsewhere.
    """

    platform: str
    kind: str = ""
    capability: tuple[int, int] | None = None

    @property
    def has_mosaic_gpu(self) -> bool:
        """Whether kernels in Mosaic GPU run: Hopper, whose warp groups multiply together."""
        return self.platform == "gpu" and self.capability == HOPPER

    @property
    def on_chip_bytes(self) -> int | None:
        """Of :data:`ON_CHIP_BYTES`; None where that is not known."""
        known = [kind for kind in ON_CHIP_BYTES if self.kind.startswith(kind)]
        return ON_CHIP_BYTES[max(known, key=len)] if known else None


def device_of(device: jax.Device) -> Device:
    """What kernels must know of a device, be it here or only compiled for."""
    capability = getattr(device, "compute_capability", None)
    parts = tuple(int(part) for part in str(capability).split(".")) if capability else None
    return Device(device.platform, device.device_kind, parts)
