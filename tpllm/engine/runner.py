"""The device side of the engine: the compiled programs, and the arrays they update in place."""
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding_rules.axes import BATCH
from tpllm.engine.batch import pack_chunk, pack_row
from tpllm.engine.compile_guard import CompileGuard
from tpllm.engine.plan import StepPlan
from tpllm.engine.programs import Chunk, StepOutput, empty_slots, jit_programs, slot_shardings
from tpllm.engine.request import Sequence
from tpllm.engine.sampling_params import MAX_STOP_TOKEN_IDS
from tpllm.engine.shapes import EngineShapes
from tpllm.environment import return_freed_memory
from tpllm.model.config import ModelConfig
from tpllm.model.kv_cache import init_cache
from tpllm.model.params import DecoderParams
from tpllm.model.sampling import TokenScores

MAX_STEPS = 32


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """A program on its way, and what it is for."""

    plan: StepPlan
    output: StepOutput | None = None
    prompt_scores: TokenScores | None = None


class Runner:
    """Runs plans on the device. Nothing here waits for a result, but for pages that are saved to the host.

    Args:
        config: the model, fitted to its mesh.
        params: its parameters.
        shapes: sizes of the programs.
        num_pages: of the KV cache, of each data group.
        eos_ids: the model's end-of-sequence ids.
        cache_dtype: of keys and values.

    Attributes:
        cache, state: the cache's pages and the slots' state. Programs take them and give them back: after one that failed, see :meth:`renew`.
    """

    def __init__(self, config: ModelConfig, params: DecoderParams, *, shapes: EngineShapes, num_pages: int, eos_ids: frozenset[int], cache_dtype):
        self.config, self.params, self.shapes, self.eos_ids = config, params, shapes, eos_ids
        self.num_pages, self.num_groups = num_pages, config.partition.size(BATCH)
        self.num_stop_ids = MAX_STOP_TOKEN_IDS + len(eos_ids)
        self.cache_dtype = jnp.dtype(cache_dtype)
        self._make_arrays()
        self.guard = CompileGuard()
        self._programs = jit_programs(config, self.cache, self.state, max_steps=MAX_STEPS)
        return_freed_memory()  # what loading left

    def dispatch(self, plan: StepPlan, is_kept: list[bool], table: np.ndarray) -> Dispatched:
        """Start the program of a plan.

        Args:
            plan: what to run.
            is_kept: for each slot whether the row in it is still wanted.
            table: int32 [B, L], the pages of each slot's row.
        """
        with self.guard:
            for group, sequence, pages in plan.saves:
                sequence.saved = jax.device_get(self._programs.read_pages(self.cache, self._padded(group, pages)))
            for group, sequence, pages in plan.restores:
                self.cache = self._programs.write_pages(self.cache, self._padded(group, pages), sequence.saved)
                sequence.saved = None
            for group, source, target in plan.copies:
                first = group * self.num_pages
                self.cache = self._programs.copy_page(self.cache, np.int32(first + source), np.int32(first + target))
            restored = {id(sequence) for _, sequence, _ in plan.restores}
            for sequence in plan.started:
                self._start(sequence, sequence.slot, is_alive=id(sequence) in restored)
            if plan.pieces:
                scores_prompt = any(piece.sequence.wants_prompt_logprobs for piece in plan.pieces)
                output, prompt_scores = self._run_step(self._pack(plan), is_kept, table, scores_prompt=scores_prompt)
                return Dispatched(plan, output, prompt_scores)
            if plan.owners:
                num_rows = self._num_rows(1 + max(owner.slot for owner in plan.owners))
                return Dispatched(plan, self._run_decode(is_kept, table, num_steps=plan.num_steps, num_rows=num_rows))
            return Dispatched(plan)

    def _pack(self, plan: StepPlan) -> Chunk:
        return pack_chunk(plan, num_slots=self.shapes.max_num_seqs, num_groups=self.num_groups, is_ragged=self.shapes.has_invariant_kernels)

    def _start(self, sequence: Sequence | None, slot: int, *, is_alive: bool, has_adjustments: bool = False) -> None:
        row = pack_row(sequence, is_alive=is_alive, eos_ids=self.eos_ids, num_stop_ids=self.num_stop_ids, vocab_size=self.config.padded_vocab_size)
        has_adjustments |= sequence is not None and sequence.request.params.adjusts_logits
        self.state = self._programs.start(self.state, np.int32(slot), row, has_adjustments=has_adjustments)

    def _run_step(self, chunk: Chunk, is_kept: list[bool], table: np.ndarray, *, scores_prompt: bool) -> tuple[StepOutput, TokenScores | None]:
        self.cache, self.state, output, prompt_scores = self._programs.step(
            self.params, self.cache, self.state, chunk, np.array(is_kept), table.copy(), scores_prompt=scores_prompt)
        return output, prompt_scores

    def _run_decode(self, is_kept: list[bool], table: np.ndarray, *, num_steps: int, num_rows: int) -> StepOutput:
        self.cache, self.state, output = self._programs.decode(
            self.params, self.cache, self.state, np.array(is_kept), table.copy(), np.int32(num_steps), num_rows=num_rows)
        return output

    def _padded(self, group: int, pages: tuple[int, ...]) -> np.ndarray:
        """[L] pages of a row among those of all groups, padded with -1."""
        padded = np.full(self.shapes.pages_per_row, -1, np.int32)
        padded[:len(pages)] = np.array(pages, np.int32) + group * self.num_pages
        return padded

    def _num_rows(self, num_busy: int) -> int:
        """The slots to compute so that the first ``num_busy`` are among them."""
        if self.num_groups > 1:
            return self.shapes.max_num_seqs
        return next(bucket for bucket in self.shapes.row_buckets if bucket >= num_busy)

    def warm_up(self, *, has_prompt_logprobs: bool = False) -> Iterator[str]:
        """Compile every program by running it on no rows, one for each item, which names it; afterwards a compile is unexpected.

        Rows that are in slots stay as they are.
        """
        for name, run in self._warm_ups(has_prompt_logprobs):
            with self.guard:
                run()
            yield name
        jax.block_until_ready(self.state)
        self.guard.arm()

    def _warm_ups(self, has_prompt_logprobs: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
        num_slots = self.shapes.max_num_seqs
        everything, table = [True] * num_slots, np.full((num_slots, self.shapes.pages_per_row), -1, np.int32)
        for has_adjustments in (False, True):  # in a slot beyond the last one, which JAX does not write
            yield "start", functools.partial(self._start, None, num_slots, is_alive=False, has_adjustments=has_adjustments)
        for bucket, scores_prompt in itertools.product(self.shapes.buckets, sorted({False, has_prompt_logprobs})):
            chunk = self._pack(StepPlan(pieces=(), owners=(), bucket=bucket))
            yield "step", functools.partial(self._run_step, chunk, everything, table, scores_prompt=scores_prompt)
        for num_rows in self.shapes.row_buckets:
            yield "decode", functools.partial(self._run_decode, everything, table, num_steps=0, num_rows=num_rows)
        yield "pages", self._move_no_pages

    def _move_no_pages(self) -> None:
        self.cache = self._programs.copy_page(self.cache, np.int32(0), np.int32(0))
        saved = jax.device_get(self._programs.read_pages(self.cache, self._padded(0, ())))
        self.cache = self._programs.write_pages(self.cache, self._padded(0, ()), saved)

    def renew(self) -> None:
        """Make cache and slots' state anew, empty, where a program that failed has taken them with it: they are donated to each one."""
        try:
            jax.block_until_ready((self.cache, self.state))
        except Exception:
            _delete((self.cache, self.state))  # what is left of them, before there is room for new ones
            self._make_arrays()

    def _make_arrays(self) -> None:
        shapes, config = self.shapes, self.config
        self.cache = init_cache(config, self.num_pages * self.num_groups, shapes.page_size, self.cache_dtype)
        self.state = jax.jit(empty_slots, static_argnums=(0, 1, 2), out_shardings=slot_shardings(config.partition))(
            shapes.max_num_seqs, self.num_stop_ids, config.padded_vocab_size)

    def close(self) -> None:
        """Give the cache's and the parameters' memory back at once."""
        _delete((self.cache, self.state, self.params))
        self.cache = self.state = self.params = None


def _delete(arrays: Any) -> None:
    for leaf in jax.tree.leaves(arrays):
        if isinstance(leaf, jax.Array) and not leaf.is_deleted():
            leaf.delete()
