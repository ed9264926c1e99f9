"""What a user may set of an engine, and the engine that comes of it."""
import dataclasses
from typing import Literal

from tpllm.engine.engine import Engine
from tpllm.engine.runner import Runner
from tpllm.engine.sampling_params import MAX_LOGPROBS
from tpllm.engine.scheduler import Scheduler
from tpllm.engine.shapes import EngineShapes, check_cache_size, choose_num_pages, choose_shapes
from tpllm.errors import ConfigError, log, short
from tpllm.model.config import ModelConfig
from tpllm.model.params import DecoderParams
from tpllm.tokenizer import Tokenizer

PREEMPTIONS = ("auto", "recompute", "swap")
ROPES_OF_PROMPT_LEN = ("dynamic", "longrope")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The options of :class:`tpllm.LLM` that concern its engine; see there."""

    max_model_len: int | None = None
    max_num_seqs: int | None = None
    prefill_chunk_size: int | None = None
    batch_invariant: bool = True
    page_size: int | None = None
    kv_cache_tokens: int | None = None
    memory_share: float | None = None
    gpu_memory_utilization: float | None = None
    enable_prefix_caching: bool = True
    preemption: Literal["auto", "recompute", "swap"] = "auto"
    max_logprobs: int = MAX_LOGPROBS

    def __post_init__(self):
        check_cache_size(self.kv_cache_tokens, self.memory_share, self.gpu_memory_utilization)
        if not isinstance(self.max_logprobs, int) or self.max_logprobs < -1:
            raise ConfigError(f"max_logprobs is {self.max_logprobs!r}; it must be a whole number, or -1 for the whole vocabulary")
        if self.preemption not in PREEMPTIONS:
            raise ConfigError(f"preemption is {self.preemption!r}; it must be one of {', '.join(PREEMPTIONS)}")

    def shapes(self, config: ModelConfig, *, has_invariant_kernels: bool) -> EngineShapes:
        """The sizes of the device programs; ``has_invariant_kernels`` says whether native kernels multiply."""
        return choose_shapes(config, max_model_len=self.max_model_len, max_num_seqs=self.max_num_seqs, prefill_chunk_size=self.prefill_chunk_size,
                             batch_invariant=self.batch_invariant, page_size=self.page_size, max_logprobs=self.max_logprobs,
                             has_invariant_kernels=has_invariant_kernels)

    def swaps(self, shapes: EngineShapes) -> bool:
        """Whether a row that loses its pages gets them back from the host: where computing them again would give other bits, or on demand.

        Raises:
            ConfigError: rows are to be computed again where that would change their tokens.
        """
        is_exact = shapes.has_invariant_kernels or not shapes.is_batch_invariant
        if self.preemption == "recompute" and not is_exact:
            raise ConfigError("preemption is 'recompute', but without native kernels a token's last bits depend on how many were computed with it; "
                              "use 'swap', or batch_invariant=False")
        return self.preemption == "swap" or (self.preemption == "auto" and not is_exact)


def drawable(eos_ids: frozenset[int], vocab_size: int) -> frozenset[int]:
    """The ids that end a text and that the model can draw; the log names the others."""
    beyond = sorted(token_id for token_id in eos_ids if token_id >= vocab_size)
    if beyond:
        log.warning("eos_token_id: %s is beyond the vocabulary of %d and never drawn; it is not used", ", ".join(map(short, beyond[:5])), vocab_size)
    return eos_ids - frozenset(beyond)


def build_engine(config: ModelConfig, params: DecoderParams, tokenizer: Tokenizer | None, *, options: EngineOptions, shapes: EngineShapes,
                 cache_dtype, seed: int = 0, eos_ids: frozenset[int] | None = None) -> Engine:
    """An engine over parameters on their mesh. ``eos_ids`` end a text; None takes those of the tokenizer, if there is one.

    Raises:
        ConfigError, MemoryNeedError: there is no room for a KV cache, or not for the one asked for.
    """
    num_pages = choose_num_pages(config, shapes, cache_dtype, kv_cache_tokens=options.kv_cache_tokens, memory_share=options.memory_share,
                                 gpu_memory_utilization=options.gpu_memory_utilization)
    if eos_ids is None:
        eos_ids = tokenizer.eos_token_ids if tokenizer else frozenset()
    eos_ids = drawable(eos_ids, config.vocab_size)
    runner = Runner(config, params, shapes=shapes, num_pages=num_pages, eos_ids=eos_ids, cache_dtype=cache_dtype)
    depends_on_prompt_len = any(rope is not None and rope.kind in ROPES_OF_PROMPT_LEN for rope in config.layer_ropes)
    scheduler = Scheduler(shapes, num_pages=num_pages, num_groups=runner.num_groups, caches_prefixes=options.enable_prefix_caching,
                          depends_on_prompt_len=depends_on_prompt_len, swaps=options.swaps(shapes))
    return Engine(runner, scheduler, tokenizer, seed=seed)
