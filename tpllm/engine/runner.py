"""The device side of the engine: the compiled programs, and the arrays they update in place."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sharding_rules.axes import BATCH
from tpllm.engine.batch import pack_prefill
from tpllm.engine.compile_guard import CompileGuard
from tpllm.engine.programs import PrefillChunk, StepOutput, empty_slots, jit_programs, slot_shardings
from tpllm.engine.sampling_params import MAX_STOP_TOKEN_IDS
from tpllm.engine.scheduler import DecodePlan, PrefillPlan
from tpllm.engine.shapes import EngineShapes
from tpllm.model.config import ModelConfig
from tpllm.model.kv_cache import init_cache
from tpllm.model.params import DecoderParams
from tpllm.model.sampling import TokenScores

MAX_STEPS = 32


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """A program on its way, and whose rows it carries."""

    plan: PrefillPlan | DecodePlan
    output: StepOutput
    prompt_scores: TokenScores | None = None


class Runner:
    """Runs plans on the device. Nothing here waits for a result.

    Args:
        config: the model, fitted to its mesh.
        params: its parameters.
        shapes: sizes of the programs.
        eos_ids: the model's end-of-sequence ids.
        cache_dtype: of keys and values.
    """

    def __init__(self, config: ModelConfig, params: DecoderParams, *, shapes: EngineShapes, eos_ids: frozenset[int], cache_dtype):
        self.config, self.params, self.shapes, self.eos_ids = config, params, shapes, eos_ids
        self.num_groups = config.partition.size(BATCH)
        self.num_stop_ids = MAX_STOP_TOKEN_IDS + len(eos_ids)
        self.cache = init_cache(config, shapes.max_num_seqs, shapes.cache_len, cache_dtype)
        self.state = jax.jit(lambda: empty_slots(shapes.max_num_seqs, self.num_stop_ids, config.padded_vocab_size),
                             out_shardings=slot_shardings(config.partition))()
        self.guard = CompileGuard()
        self._prefill, self._decode = jit_programs(config, self.cache, self.state, max_steps=MAX_STEPS)

    def dispatch(self, plan: PrefillPlan | DecodePlan, is_kept: list[bool]) -> Dispatched:
        """Start the program of a plan.

        Args:
            plan: what to run.
            is_kept: for each slot whether the row in it is still wanted.
        """
        with self.guard:
            return self._dispatch_prefill(plan) if isinstance(plan, PrefillPlan) else self._dispatch_decode(plan, is_kept)

    def _dispatch_prefill(self, plan: PrefillPlan) -> Dispatched:
        has_prompt_logprobs = any(sequence.wants_prompt_logprobs for sequence, _ in plan.rows)
        output, prompt_scores = self._run_prefill(self._pack(plan), has_prompt_logprobs=has_prompt_logprobs)
        return Dispatched(plan=plan, output=output, prompt_scores=prompt_scores)

    def _dispatch_decode(self, plan: DecodePlan, is_kept: list[bool]) -> Dispatched:
        num_rows = self._num_rows(1 + max(slot for slot, _ in plan.owners))
        return Dispatched(plan=plan, output=self._run_decode(is_kept, num_steps=plan.num_steps, num_rows=num_rows))

    def _pack(self, plan: PrefillPlan) -> PrefillChunk:
        return pack_prefill(plan, num_slots=self.shapes.max_num_seqs, num_groups=self.num_groups, eos_ids=self.eos_ids,
                            num_stop_ids=self.num_stop_ids, vocab_size=self.config.padded_vocab_size)

    def _run_prefill(self, chunk: PrefillChunk, *, has_prompt_logprobs: bool) -> tuple[StepOutput, TokenScores | None]:
        self.cache, self.state, output, prompt_scores = self._prefill(self.params, self.cache, self.state, chunk,
                                                                      has_prompt_logprobs=has_prompt_logprobs)
        return output, prompt_scores

    def _run_decode(self, is_kept: list[bool], *, num_steps: int, num_rows: int) -> StepOutput:
        self.cache, self.state, output = self._decode(self.params, self.cache, self.state, np.array(is_kept), np.int32(num_steps),
                                                      num_rows=num_rows)
        return output

    def _num_rows(self, num_busy: int) -> int:
        """The slots to compute when the busy ones are among the first ``num_busy``."""
        if self.num_groups > 1:
            return self.shapes.max_num_seqs
        return next(bucket for bucket in self.shapes.row_buckets if bucket >= num_busy)

    def warm_up(self, *, has_prompt_logprobs: bool = False) -> None:
        """Compile every program by running it on no rows; afterwards a compile is unexpected."""
        nothing = [False] * self.shapes.max_num_seqs
        with self.guard:
            for bucket in self.shapes.buckets:
                chunk = self._pack(PrefillPlan(rows=(), bucket=bucket))
                for is_scored in {False, has_prompt_logprobs}:
                    self._run_prefill(chunk, has_prompt_logprobs=is_scored)
            for num_rows in self.shapes.row_buckets:
                self._run_decode(nothing, num_steps=1, num_rows=num_rows)
        jax.block_until_ready(self.state)
        self.guard.arm()

    def close(self) -> None:
        """Give the cache's and the parameters' memory back at once."""
        for leaf in jax.tree.leaves((self.cache, self.state, self.params)):
            if isinstance(leaf, jax.Array) and not leaf.is_deleted():
                leaf.delete()
        self.cache = self.state = self.params = None

    @property
    def cache_dtype(self) -> jnp.dtype:
        """The dtype of keys and values."""
        return self.cache.keys[0].dtype
