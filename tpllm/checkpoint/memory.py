"""Whether a model fits, asked before anything is loaded."""
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tpllm.environment.memory import device_free_bytes, host_free_bytes
from tpllm.errors import MemoryNeedError
from tpllm.model.config import ModelConfig
from tpllm.model.params import abstract_params, named_leaves
from tpllm.weights.storage import Storage

GIB = 2**30
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


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
