"""Memory that is free, on devices, on the host and under the limits of containers, and what goes back to the system."""
from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import jax

_UNLIMITED = 2**60  # version 1 of cgroups writes "no limit" as a number near 2^63


def device_free_bytes(device: jax.Device) -> int | None:
    """Free bytes of an accelerator, or None where its client does not tell."""
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def device_unused_bytes(device: jax.Device, share: float) -> int:
    """What is not in use yet of a share of an accelerator's memory, whose client tells how much that is."""
    stats = device.memory_stats()
    return int(share * stats["bytes_limit"]) - stats.get("bytes_in_use", 0)


def host_unused_bytes(share: float) -> int:
    """What this process does not use yet of a share of this machine's memory."""
    return int(share * psutil.virtual_memory().total) - psutil.Process().memory_info().rss


def host_free_bytes() -> int:
    """Free bytes of this machine, or of the container's limit where that is less."""
    limits = cgroup_free_bytes(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    return min([psutil.virtual_memory().available, *limits])


def cgroup_free_bytes(root: Path, membership: Path) -> list[int]:
    """What each memory limit above this process leaves free, of version 1 and 2 of Linux's control groups.

    Args:
        root: where they are mounted.
        membership: the file that names this process's groups, lines of ``id:controllers:path``.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return []
    free = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        is_v2 = controllers == ""
        if not is_v2 and "memory" not in controllers.split(","):
            continue
        base = root if is_v2 else root / "memory"
        # Inside a container the path can be the host's, which is not mounted; the root is then the container's own group.
        group = base / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                free += _free_in(folder, ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    return free


def _free_in(folder: Path, names: tuple[str, str]) -> list[int]:
    try:
        limit_text, usage = ((folder / name).read_text().strip() for name in names)
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    if limit_text == "max" or int(limit_text) >= _UNLIMITED:
        return []
    # Cached pages of files count as used, but are given back when memory is asked for.
    prefix = "total_" if "total_inactive_file" in stat else ""
    cached = int(stat.get(f"{prefix}inactive_file", 0)) + int(stat.get(f"{prefix}active_file", 0))
    return [max(0, int(limit_text) - max(0, int(usage) - cached))]


def return_freed_memory() -> None:
    """Give the system back what loading or compiling left free in the C library's heap: tens of MB, which would stay beside the model.

    Only glibc has a call for it; elsewhere this does nothing.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
