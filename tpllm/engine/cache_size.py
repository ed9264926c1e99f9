"""How many pages the KV cache gets."""
import logging

from rich.filesize import decimal

from sharding_rules.axes import BATCH
from tpllm.engine.shapes import EngineShapes
from tpllm.environment.memory import device_free_bytes, host_free_bytes
from tpllm.errors import ConfigError, MemoryNeedError
from tpllm.model.config import ModelConfig
from tpllm.model.kv_cache import cache_bytes_per_device

log = logging.getLogger("tpllm")

MEMORY_SHARE, MEMORY_SHARE_CPU = 0.9, 0.5  # of what the weights leave; a CPU's memory serves others too


def check_cache_size(kv_cache_tokens: int | None, memory_share: float | None) -> None:
    """Raise ``ConfigError`` for sizes that no cache can have."""
    if kv_cache_tokens is not None and (not isinstance(kv_cache_tokens, int) or isinstance(kv_cache_tokens, bool) or kv_cache_tokens < 1):
        raise ConfigError(f"kv_cache_tokens is {kv_cache_tokens!r}; it must be a whole number of at least 1, or None for as many as fit")
    if memory_share is not None and not 0 < memory_share <= 1:
        raise ConfigError(f"memory_share is {memory_share!r}; it must be above 0 and at most 1")
    if kv_cache_tokens is not None and memory_share is not None:
        raise ConfigError(f"kv_cache_tokens is {kv_cache_tokens} and memory_share {memory_share}; give one of them")


def page_bytes(config: ModelConfig, shapes: EngineShapes, dtype) -> int:
    """Bytes on each device of one page of each data group, in all layers."""
    return cache_bytes_per_device(config, config.partition.size(BATCH), shapes.page_size, dtype)


def least_cache_bytes(config: ModelConfig, shapes: EngineShapes, dtype, *, kv_cache_tokens: int | None = None) -> int:
    """Bytes on each device of the smallest cache that will do: one page, or what was asked for."""
    num_pages = 1 if kv_cache_tokens is None else -(-kv_cache_tokens // (shapes.page_size * config.partition.size(BATCH)))
    return num_pages * page_bytes(config, shapes, dtype)


def choose_num_pages(config: ModelConfig, shapes: EngineShapes, dtype, *, kv_cache_tokens: int | None = None,
                     memory_share: float | None = None) -> int:
    """Pages of each data group, once the weights are loaded.

    Args:
        config: fitted to its mesh.
        shapes: the engine's sizes.
        dtype: of keys and values.
        kv_cache_tokens: of all groups together; rounded up to whole pages.
        memory_share: of the free memory of the device that has least; None for 0.9. On CPU, and where a device does not tell, as much as
            ``max_num_seqs`` rows of ``max_model_len`` can use is enough, and None is at most half of the free memory.

    Raises:
        ConfigError: room for no page; how much memory was found, and what to lower.
        MemoryNeedError: ``kv_cache_tokens`` that do not fit.
    """
    check_cache_size(kv_cache_tokens, memory_share)
    num_groups, one, free = config.partition.size(BATCH), page_bytes(config, shapes, dtype), _free_bytes(config)
    if kv_cache_tokens is not None:
        num_pages = -(-kv_cache_tokens // (shapes.page_size * num_groups))
        if free is not None and num_pages * one > free:
            raise MemoryNeedError(f"kv_cache_tokens is {kv_cache_tokens}, which takes {decimal(num_pages * one)} on each device, {decimal(free)} are "
                                  f"free there; use at most {free // one * shapes.page_size * num_groups}")
    else:
        is_cpu = config.partition.platform == "cpu"
        share = (MEMORY_SHARE_CPU if is_cpu else MEMORY_SHARE) if memory_share is None else memory_share
        wanted = shapes.max_num_seqs // num_groups * shapes.pages_per_row
        num_pages = wanted if free is None else int(free * share) // one
        if is_cpu:
            num_pages = min(num_pages, wanted)
    if num_pages < 1:
        raise ConfigError(f"no page of the KV cache fits: one takes {decimal(one)} on each device ({shapes.page_size} tokens), {decimal(free)} are "
                          f"free there, of which memory_share allows {decimal(int(free * share))}; lower the size of the model or page_size, take a "
                          "smaller dtype or kv_cache_dtype, raise memory_share, or use a mesh of more devices")
    _report(shapes, num_pages, num_groups=num_groups, num_bytes=num_pages * one)
    return num_pages


def _report(shapes: EngineShapes, num_pages: int, *, num_groups: int, num_bytes: int) -> None:
    num_tokens = num_pages * shapes.page_size
    log.info("KV cache: %d pages of %d tokens, %s on each device; room for %d tokens, or %.1f rows of %d", num_pages * num_groups, shapes.page_size,
             decimal(num_bytes), num_tokens * num_groups, num_groups * num_pages / shapes.pages_per_row, shapes.max_model_len)
    if num_pages < shapes.pages_per_row:
        log.warning("the KV cache has room for %d tokens, less than max_model_len %d: no row gets longer; raise kv_cache_tokens or memory_share, or "
                    "lower max_model_len", num_tokens, shapes.max_model_len)


def _free_bytes(config: ModelConfig) -> int | None:
    devices = config.partition.mesh.local_devices
    if config.partition.platform == "cpu":
        return host_free_bytes() // len(devices)  # virtual devices share it
    free = [device_free_bytes(device) for device in devices]
    return None if None in free else min(free)
