"""The static sizes of the engine's device programs."""
import dataclasses
import logging

from sharding_rules.axes import BATCH
from tpllm.errors import ConfigError
from tpllm.model.config import ModelConfig

log = logging.getLogger("tpllm")

MIN_BUCKET = 16
DEFAULT_PAGE = 32
MAX_SEQS = 1024
DEFAULT_CONTEXT = 4096
DEFAULT_SEQS, DEFAULT_SEQS_CPU = 32, 8
DEFAULT_CHUNK, DEFAULT_CHUNK_CPU = 512, 128


@dataclasses.dataclass(frozen=True)
class EngineShapes:
    """The static sizes of the device programs.

    Attributes:
        max_num_seqs: slots; decode always computes this many rows, or fewer where results may depend on it.
        max_model_len: tokens a row can hold, prompt and completion together.
        prefill_chunk: most prompt tokens in one program, a power of two of at least 16.
        page_size: tokens of a page of the KV cache.
        is_batch_invariant: whether results may not depend on how many slots are busy.
        has_invariant_kernels: whether products give a row the same bits at any number of rows. Where they do not, a batch-invariant decode
            always runs at ``max_num_seqs`` rows.
    """

    max_num_seqs: int
    max_model_len: int
    prefill_chunk: int
    page_size: int = DEFAULT_PAGE
    is_batch_invariant: bool = True
    has_invariant_kernels: bool = False

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
        """Padded chunk lengths: powers of two up to ``prefill_chunk``."""
        return tuple(2**i for i in range(MIN_BUCKET.bit_length() - 1, self.prefill_chunk.bit_length()))

    def bucket_for(self, num_tokens: int) -> int:
        """The smallest bucket that holds so many tokens, or the largest there is."""
        return next((bucket for bucket in self.buckets if bucket >= num_tokens), self.buckets[-1])

    def bucket_below(self, num_tokens: int) -> int:
        """The largest bucket that so many tokens fill, or the smallest there is."""
        return max((bucket for bucket in self.buckets if bucket <= num_tokens), default=self.buckets[0])

    @property
    def pages_per_row(self) -> int:
        """Pages of a row of ``max_model_len`` tokens."""
        return -(-self.max_model_len // self.page_size)

    @property
    def shared_multiple(self) -> int:
        """Rows share multiples of so many tokens: pages, or whole chunks where a token's bits depend on how many were computed with it."""
        is_free = self.has_invariant_kernels or not self.is_batch_invariant
        return self.page_size if is_free else max(self.page_size, self.prefill_chunk)

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """How many slots a decode may compute: all, or also the powers of two below where results may depend on it, or do not."""
        if self.is_batch_invariant and not self.has_invariant_kernels:
            return (self.max_num_seqs,)
        return (*(2**i for i in range((self.max_num_seqs - 1).bit_length())), self.max_num_seqs)


def choose_shapes(config: ModelConfig, *, max_model_len: int | None, max_num_seqs: int | None, prefill_chunk_size: int | None,
                  batch_invariant: bool, page_size: int | None = None, has_invariant_kernels: bool = False) -> EngineShapes:
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
        has_invariant_kernels=has_invariant_kernels)
