"""The static sizes of an engine's device programs, and of its KV cache."""
import dataclasses

from rich.filesize import decimal

from sharding_rules.axes import BATCH
from tpllm.engine.sampling_params import MAX_LOGPROBS
from tpllm.environment.memory import device_free_bytes, device_unused_bytes, host_free_bytes, host_unused_bytes
from tpllm.errors import ConfigError, MemoryNeedError, log
from tpllm.model.config import ModelConfig
from tpllm.model.kv_cache import cache_bytes_per_device

MIN_BUCKET = 16
DEFAULT_PAGE = 32
MAX_SEQS = 1024
DEFAULT_CONTEXT = 4096
DEFAULT_SEQS, DEFAULT_SEQS_CPU = 32, 8
DEFAULT_CHUNK, DEFAULT_CHUNK_CPU = 512, 128
MEMORY_SHARE, MEMORY_SHARE_CPU = 0.9, 0.5  # the share of the memory left by the weights; other programs use a CPU's memory too


@dataclasses.dataclass(frozen=True)
class EngineShapes:
    """The static sizes of the device programs.

    Attributes:
        max_num_seqs: the number of slots. Decode always computes this many rows, or fewer where results may depend on the number.
        max_model_len: the most tokens of a row, prompt and completion together.
        prefill_chunk: the most prompt tokens of one program: a power of two, at least 16.
        page_size: tokens in a page of the KV cache.
        is_batch_invariant: whether results may not depend on how many slots are busy.
        has_invariant_kernels: whether products give a row the same bits at any number of rows. Where they do not, a batch-invariant decode
            always runs at ``max_num_seqs`` rows.
        max_logprobs: the most log probabilities that are reported of a token.
    """

    max_num_seqs: int
    max_model_len: int
    prefill_chunk: int
    page_size: int = DEFAULT_PAGE
    is_batch_invariant: bool = True
    has_invariant_kernels: bool = False
    max_logprobs: int = MAX_LOGPROBS

    def __post_init__(self):
        for name in ("max_num_seqs", "max_model_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.prefill_chunk < MIN_BUCKET or self.prefill_chunk & (self.prefill_chunk - 1):
            raise ConfigError(f"prefill_chunk_size is {self.prefill_chunk}; it must be a power of two of at least {MIN_BUCKET}")
        if self.page_size not in (16, 32, 64, 128):
            raise ConfigError(f"page_size is {self.page_size}; it must be 16, 32, 64 or 128 tokens")
        if self.max_num_seqs > MAX_SEQS:
            raise ConfigError(f"max_num_seqs is {self.max_num_seqs}; it must be at most {MAX_SEQS}")

    @property
    def buckets(self) -> tuple[int, ...]:
        """The lengths that chunks are padded to: powers of two up to ``prefill_chunk``."""
        return tuple(2**i for i in range(MIN_BUCKET.bit_length() - 1, self.prefill_chunk.bit_length()))

    def bucket_for(self, num_tokens: int) -> int:
        """The smallest bucket that holds so many tokens, or the largest there is."""
        return next((bucket for bucket in self.buckets if bucket >= num_tokens), self.buckets[-1])

    def bucket_below(self, num_tokens: int) -> int:
        """The largest bucket that so many tokens fill, or the smallest there is."""
        return max((bucket for bucket in self.buckets if bucket <= num_tokens), default=self.buckets[0])

    @property
    def pages_per_row(self) -> int:
        """The number of pages that a row of ``max_model_len`` tokens takes."""
        return -(-self.max_model_len // self.page_size)

    @property
    def shared_multiple(self) -> int:
        """Rows share multiples of this many tokens: pages, or whole chunks where a token's bits depend on how many were computed with it."""
        is_free = self.has_invariant_kernels or not self.is_batch_invariant
        return self.page_size if is_free else max(self.page_size, self.prefill_chunk)

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """How many slots a decode may compute: all, or also the powers of two below where results may depend on it, or do not."""
        if self.is_batch_invariant and not self.has_invariant_kernels:
            return (self.max_num_seqs,)
        return (*(2**i for i in range((self.max_num_seqs - 1).bit_length())), self.max_num_seqs)


def choose_shapes(config: ModelConfig, *, max_model_len: int | None, max_num_seqs: int | None, prefill_chunk_size: int | None,
                  batch_invariant: bool, page_size: int | None = None, has_invariant_kernels: bool = False,
                  max_logprobs: int = MAX_LOGPROBS) -> EngineShapes:
    """The sizes a user asked for, with the defaults of the mesh's platform. They do not depend on how much memory happens to be free, so
    that a job resumes under the sizes it began with. ``has_invariant_kernels`` says whether native kernels multiply.

    Raises:
        ConfigError: a context beyond the model's, a size that cannot be, or a number of rows that the mesh's data axis does not divide.
    """
    is_cpu, num_groups = config.partition.platform == "cpu", config.partition.size(BATCH)
    if max_num_seqs is not None and max_num_seqs % num_groups:
        raise ConfigError(f"max_num_seqs {max_num_seqs} is no multiple of the mesh's dp size {num_groups}; "
                          f"use {-(-max_num_seqs // num_groups) * num_groups}")
    default_seqs = DEFAULT_SEQS_CPU if is_cpu else DEFAULT_SEQS
    if max_model_len is not None and max_model_len > config.max_position:
        raise ConfigError(f"max_model_len is {max_model_len}; the model's context is {config.max_position}; use at most that")
    if max_model_len is None and config.max_position > DEFAULT_CONTEXT:
        log.info("max_model_len is %d of the model's %d; raise it for longer rows", DEFAULT_CONTEXT, config.max_position)
    max_model_len = min(config.max_position, DEFAULT_CONTEXT) if max_model_len is None else max_model_len
    default_chunk = DEFAULT_CHUNK_CPU if is_cpu and not has_invariant_kernels else DEFAULT_CHUNK
    if has_invariant_kernels:
        default_chunk = min(default_chunk, max(MIN_BUCKET, 1 << max(max_model_len - 1, 0).bit_length()))
    return EngineShapes(
        max_num_seqs=-(-default_seqs // num_groups) * num_groups if max_num_seqs is None else max_num_seqs, max_model_len=max_model_len,
        prefill_chunk=default_chunk if prefill_chunk_size is None else prefill_chunk_size,
        page_size=DEFAULT_PAGE if page_size is None else page_size, is_batch_invariant=batch_invariant,
        max_logprobs=config.vocab_size if max_logprobs == -1 else max_logprobs,
        has_invariant_kernels=has_invariant_kernels)


def check_cache_size(kv_cache_tokens: int | None, memory_share: float | None, gpu_memory_utilization: float | None = None) -> None:
    """Raise ``ConfigError`` for sizes that no cache can have."""
    if kv_cache_tokens is not None and (not isinstance(kv_cache_tokens, int) or isinstance(kv_cache_tokens, bool) or kv_cache_tokens < 1):
        raise ConfigError(f"kv_cache_tokens is {kv_cache_tokens!r}; it must be a whole number of at least 1, or None for as many as fit")
    for name, share in (("memory_share", memory_share), ("gpu_memory_utilization", gpu_memory_utilization)):
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"{name} is {share!r}; it must be above 0 and at most 1")
    if kv_cache_tokens is not None and memory_share is not None:
        raise ConfigError(f"kv_cache_tokens is {kv_cache_tokens} and memory_share {memory_share}; give one of them")
    if memory_share is not None and gpu_memory_utilization is not None:
        raise ConfigError(f"memory_share is {memory_share} and gpu_memory_utilization {gpu_memory_utilization}; give one of them")


def page_bytes(config: ModelConfig, shapes: EngineShapes, dtype) -> int:
    """Bytes on each device of one page of each data group, in all layers."""
    return cache_bytes_per_device(config, config.partition.size(BATCH), shapes.page_size, dtype)


def least_cache_bytes(config: ModelConfig, shapes: EngineShapes, dtype, *, kv_cache_tokens: int | None = None) -> int:
    """Bytes on each device of the smallest cache that will do: one page, or what was asked for."""
    num_pages = 1 if kv_cache_tokens is None else -(-kv_cache_tokens // (shapes.page_size * config.partition.size(BATCH)))
    return num_pages * page_bytes(config, shapes, dtype)


def choose_num_pages(config: ModelConfig, shapes: EngineShapes, dtype, *, kv_cache_tokens: int | None = None,
                     memory_share: float | None = None, gpu_memory_utilization: float | None = None) -> int:
    """The number of pages of each data group, once the weights are loaded.

    Args:
        config: the model, fitted to its mesh.
        shapes: the engine's sizes.
        dtype: the dtype of keys and values.
        kv_cache_tokens: tokens of all groups together; rounded up to whole pages.
        memory_share: the share of the free memory of the device that has the least; None for 0.9. On a CPU, and where a device does not say how
            much is free, the cache is no larger than ``max_num_seqs`` rows of ``max_model_len`` can use, and None is at most half of the free memory.
        gpu_memory_utilization: instead of it the share of all of a device's memory that this process may take, the weights included.

    Raises:
        ConfigError: there is no room for a single page; the text says how much memory was found, and what to lower.
        MemoryNeedError: ``kv_cache_tokens`` that do not fit.
    """
    check_cache_size(kv_cache_tokens, memory_share, gpu_memory_utilization)
    num_groups, one_page, free = config.partition.size(BATCH), page_bytes(config, shapes, dtype), _free_bytes(config)
    if kv_cache_tokens is not None:
        num_pages = -(-kv_cache_tokens // (shapes.page_size * num_groups))
        if free is not None and num_pages * one_page > free:
            raise MemoryNeedError(f"kv_cache_tokens is {kv_cache_tokens}, which takes {decimal(num_pages * one_page)} on each device, "
                                  f"{decimal(free)} are free there; use at most {free // one_page * shapes.page_size * num_groups}")
    else:
        is_cpu = config.partition.platform == "cpu"
        share = (MEMORY_SHARE_CPU if is_cpu else MEMORY_SHARE) if memory_share is None else memory_share
        allowed = None if free is None else int(free * share)
        if gpu_memory_utilization is not None and free is not None:
            allowed = min(free, _unused_bytes(config, gpu_memory_utilization))
        wanted = shapes.max_num_seqs // num_groups * shapes.pages_per_row
        num_pages = wanted if allowed is None else allowed // one_page
        if is_cpu:
            num_pages = min(num_pages, wanted)
    if num_pages < 1:
        name = "memory_share" if gpu_memory_utilization is None else "gpu_memory_utilization"
        raise ConfigError(f"no page of the KV cache fits: one takes {decimal(one_page)} on each device ({shapes.page_size} tokens), "
                          f"{decimal(free)} are free there, of which {name} allows {decimal(max(allowed, 0))}; lower the size of the model "
                          f"or page_size, take a smaller dtype or kv_cache_dtype, raise {name}, or use a mesh of more devices")
    _report(shapes, num_pages, num_groups=num_groups, num_bytes=num_pages * one_page)
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


def _unused_bytes(config: ModelConfig, share: float) -> int:
    """What this process has not taken yet of a share of each device's memory."""
    devices = config.partition.mesh.local_devices
    if config.partition.platform == "cpu":
        return host_unused_bytes(share) // len(devices)
    return min(device_unused_bytes(device, share) for device in devices)
