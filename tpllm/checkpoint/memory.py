"""Whether a model fits, asked before anything is loaded."""
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil

from tpllm.errors import MemoryNeedError
from tpllm.model.config import ModelConfig
from tpllm.model.params import abstract_params, named_leaves
from tpllm.weights.storage import Storage

GIB = 2**30
_UNLIMITED = 2**60  # version 1 of cgroups writes "no limit" as a number near 2^63
_FIX = "Lower kv_cache_tokens, take a smaller dtype or model, or"


def needed_bytes(config: ModelConfig, *, dtype: Any, cache_bytes_per_device: int,
                 storage: Storage | None = None) -> tuple[dict[jax.Device, int], int]:
    """What a model takes once it is loaded.

    Args:
        config: fitted to a mesh, or as it is for the default device.
        dtype: of the weights.
        cache_bytes_per_device: of the KV cache, bytes on each device.
        storage: how matrices are kept; None for plain arrays.

    Returns:
        (bytes on each local device; bytes of the largest tensor, which a load may hold beside them on the host). On CPU, where replicas share
        one buffer, a slice counts for the first device that holds it.
    """
    needed: dict[jax.Device, int] = {}
    largest = 0
    for _, leaf in named_leaves(abstract_params(config, dtype, storage)):
        item_bytes = np.dtype(leaf.dtype).itemsize
        largest = max(largest, math.prod(leaf.shape) * item_bytes)
        slice_bytes, seen = math.prod(leaf.sharding.shard_shape(leaf.shape)) * item_bytes, set()
        for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
            key = tuple((part.start, part.stop) for part in index)
            is_shared = device.platform == "cpu" and key in seen
            seen.add(key)
            needed[device] = needed.get(device, cache_bytes_per_device) + (0 if is_shared else slice_bytes)
    return needed, largest


def check_memory(needed_by_device: Mapping[jax.Device, int], *, staging_bytes: int = 0) -> None:
    """Compare what is needed with what is free; CPU devices share the host's memory.

    Args:
        needed_by_device: bytes on each local device.
        staging_bytes: what loading holds on the host for a while.

    Raises:
        MemoryNeedError: it does not fit; both numbers in GiB, and what to change.
    """
    on_host = staging_bytes
    for device, needed in needed_by_device.items():
        if device.platform == "cpu":
            on_host += needed
            continue
        free = device_free_bytes(device)
        if free is not None and needed > free:
            raise MemoryNeedError(f"the model needs {_gib(needed)} on {device}, {_gib(free)} are free there. {_FIX} a mesh of more devices")
    free = host_free_bytes()
    if on_host > free:
        raise MemoryNeedError(f"the model needs {_gib(on_host)} of host memory, {_gib(free)} are free. {_FIX} free some memory")


def device_free_bytes(device: jax.Device) -> int | None:
    """Free bytes of an accelerator, or None where its client does not tell."""
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


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


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
