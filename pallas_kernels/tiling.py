"""What kernels are made for, and which tiles they take there.

A kernel's tiles are a frozen dataclass. Its module lists candidates, the best known first; those that do not fit into a device's memory on the chip
are never launched; :func:`tune` measures the rest on a device and stores the fastest, where :func:`choose_tiles` finds it.

Results stand in one JSON file for each kind of device, ``{op: {key: {"tiles": ..., "microseconds": ..., "jax": ...}}}``: those that come with the
package in ``pallas_kernels/tiles/``, and the user's own, which go before, in ``$TPLLM_TILES`` or else ``$XDG_CACHE_HOME/tpllm/tiles``.
"""
import dataclasses
import functools
import importlib.resources
import itertools
import json
import logging
import os
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax

_log = logging.getLogger(__name__)

Tiles = TypeVar("Tiles")
KIB = 1024
ON_CHIP_BYTES = {"NVIDIA H100": 227 * KIB, "NVIDIA H200": 227 * KIB, "TPU v5 lite": 128 * KIB**2, "TPU v5": 64 * KIB**2, "TPU v6": 128 * KIB**2}
"""The memory on the chip by the beginning of a device's kind (the longest counts): shared memory of a GPU's block, or a TPU core's vector memory."""
HOPPER = (9, 0)
NUM_SAMPLES, SAMPLE_SECONDS = 7, 5e-3  # of one candidate's measurement; a sample is as many calls as take about that long


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
        """The device's entry of :data:`ON_CHIP_BYTES`; None where there is none."""
        known = [kind for kind in ON_CHIP_BYTES if self.kind.startswith(kind)]
        return ON_CHIP_BYTES[max(known, key=len)] if known else None


def device_of(device: jax.Device) -> Device:
    """What kernels must know of a device, be it here or only compiled for."""
    capability = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))  # an AMD GPU's is a name
    return Device(device.platform, device.device_kind, (int(capability[1]), int(capability[2])) if capability else None)


def choose_tiles(op: str, device: Device, key: tuple[int | str, ...], candidates: Iterable[Tiles],
                 on_chip_bytes: Callable[[Tiles], int]) -> Tiles:
    """The tiles that a kernel takes: the stored result for these shapes where there is one, else the first candidate that fits.

    Args:
        op: the kernel's name.
        device: what it is compiled for.
        key: what the choice depends on: shapes, dtypes.
        candidates: frozen dataclasses of one class, the best known first. A stored result that is no candidate any more is passed over.
        on_chip_bytes: how much memory on the chip a candidate needs.

    Raises:
        ValueError: none fits into what the device has.
    """
    fitting = _fitting(op, device, key, candidates, on_chip_bytes)
    stored = _stored_fields(op, device, key)
    return next((tiles for tiles in fitting if dataclasses.asdict(tiles) == stored), fitting[0])


def tune(op: str, device: Device, key: tuple[int | str, ...], candidates: Iterable[Tiles], on_chip_bytes: Callable[[Tiles], int],
         build: Callable[[Tiles], Callable[[], Any]]) -> Tiles:
    """Measure every candidate that fits, and store the fastest in the user's folder.

    Args:
        op, device, key, candidates, on_chip_bytes: see :func:`choose_tiles`.
        build: gives a function without arguments that runs the kernel with these tiles on the device, compiled at its first call. One that cannot
            be compiled is passed over, and the log says so.

    Raises:
        ValueError: none fits, or none can be compiled.
    """
    fastest, least_seconds, error = None, float("inf"), None
    for tiles in _fitting(op, device, key, candidates, on_chip_bytes):
        try:
            run = build(tiles)
            jax.block_until_ready(run())
        except Exception as failure:  # compilers raise anything
            _log.warning("%s %s on %s: %s cannot be compiled: %s", op, key, device.kind, tiles, failure)
            error = failure
            continue
        seconds = _median_seconds(run)
        _log.info("%s %s on %s: %s takes %.1f us", op, key, device.kind, tiles, 1e6 * seconds)
        if seconds < least_seconds:
            fastest, least_seconds = tiles, seconds
    if fastest is None:
        raise ValueError(f"{op} {key}: no candidate tiles can be compiled for {device.kind or device.platform}; the last error: {error}") from error
    _store(op, device, key, {"tiles": dataclasses.asdict(fastest), "microseconds": round(1e6 * least_seconds, 3), "jax": jax.__version__})
    return fastest


def user_folder() -> pathlib.Path:
    """Where :func:`tune` stores: ``$TPLLM_TILES``, else ``tpllm/tiles`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if named := os.environ.get("TPLLM_TILES"):
        return pathlib.Path(named)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(caches) if caches else pathlib.Path.home() / ".cache") / "tpllm" / "tiles"


def _fitting(op, device, key, candidates, on_chip_bytes):
    """Those candidates that fit, in their order; at least one."""
    candidates, limit = list(candidates), device.on_chip_bytes
    if not candidates:
        raise ValueError(f"{op}: no tiles are known for shapes {key}")
    fitting = [tiles for tiles in candidates if limit is None or on_chip_bytes(tiles) <= limit]
    if not fitting:
        least = min(map(on_chip_bytes, candidates))
        raise ValueError(f"{op}: shapes {key} need at least {least} bytes of memory on the chip, but {device.kind} has {limit}; "
                         "take smaller shapes, or implementation='reference'")
    return fitting


def _median_seconds(run: Callable[[], Any]) -> float:
    """The median seconds of one call when calls follow each other; :func:`tune` has warmed it up."""
    num_calls, samples = 1, []
    while len(samples) < NUM_SAMPLES:
        start = time.perf_counter()
        for _ in itertools.repeat(None, num_calls):
            out = run()
        jax.block_until_ready(out)
        seconds = time.perf_counter() - start
        if not samples and seconds < SAMPLE_SECONDS / 2 and num_calls < 1000:
            num_calls = min(1000, max(2 * num_calls, int(num_calls * SAMPLE_SECONDS / max(seconds, 1e-9))))
        else:
            samples.append(seconds / num_calls)
    return statistics.median(samples)


def _file_name(device: Device) -> str:
    return re.sub("[^a-z0-9]+", "_", (device.kind or device.platform).lower()).strip("_") + ".json"


def _key_text(key: tuple[int | str, ...]) -> str:
    return ",".join(map(str, key))


def _stored_fields(op: str, device: Device, key: tuple[int | str, ...]) -> dict[str, Any] | None:
    shipped = importlib.resources.files("pallas_kernels").joinpath("tiles", _file_name(device))
    for file in (user_folder() / _file_name(device), pathlib.Path(str(shipped))):
        if entry := _read_file(file).get(op, {}).get(_key_text(key)):
            return entry["tiles"]
    return None


def _read_file(path: pathlib.Path) -> dict[str, Any]:
    try:
        stat = path.stat()
    except OSError:
        return {}
    return _parse_file(path, stat.st_mtime_ns, stat.st_size, stat.st_ino)


@functools.lru_cache(maxsize=8)
def _parse_file(path: pathlib.Path, *_version: int) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if not all("tiles" in entry for entries in found.values() for entry in entries.values()):
            raise TypeError("an entry has no tiles")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _log.warning("stored tiles in %s are left out: %s; delete the file", path, error)
        return {}
    return found


def _store(op: str, device: Device, key: tuple[int | str, ...], entry: dict[str, Any]) -> None:
    path = user_folder() / _file_name(device)
    found = _read_file(path)
    found = {**found, op: {**found.get(op, {}), _key_text(key): entry}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(found, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        _log.warning("the fastest tiles of %s %s cannot be stored in %s: %s", op, key, path, error)
