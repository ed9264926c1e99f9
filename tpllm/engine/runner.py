"""Makes calls of device programs out of plans."""
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sharding_rules.axes import BATCH
from tpllm.engine.batch import pack_chunk, row_of
from tpllm.engine.executor import CompileGuard, Executor, LocalExecutor, ProgramCall
from tpllm.engine.plan import Move, StepPlan
from tpllm.engine.programs import StepOutput
from tpllm.engine.roofline import find_costs
from tpllm.engine.sampling_params import MAX_STOP_TOKEN_IDS, SamplingParams
from tpllm.engine.shapes import EngineShapes
from tpllm.engine.slots import pack_slot
from tpllm.environment.memory import return_freed_memory
from tpllm.model.config import ALL_LAYERS, ModelConfig
from tpllm.model.params import DecoderParams
from tpllm.model.per_row import Row
from tpllm.model.sampling import STOP_IDS, TokenScores

ADJUSTING = SamplingParams(presence_penalty=1.0)
NO_ROW = Row(SamplingParams(), prompt=[0])  # to compile with


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """A program that was dispatched, its plan, and its results, which may not be there yet."""

    plan: StepPlan
    output: StepOutput | None = None
    prompt_scores: TokenScores | None = None


class Runner:
    """Makes the calls of a plan and hands them to an executor. It waits for no result.

    Args:
        config: the model, fitted to its mesh.
        params: its parameters.
        shapes: sizes of the programs.
        num_pages: pages of the KV cache of each data group.
        eos_ids: the model's end-of-sequence ids.
        cache_dtype: the dtype of keys and values.

    Attributes:
        executor: runs the calls.
        costs: what the programs read and compute, by the model's sizes.
    """

    def __init__(self, config: ModelConfig, params: DecoderParams, *, shapes: EngineShapes, num_pages: int, eos_ids: frozenset[int], cache_dtype):
        self.config, self.shapes, self.eos_ids = config, shapes, eos_ids
        self.num_pages, self.num_groups = num_pages, config.partition.size(BATCH)
        self.cache_dtype, self.num_stop_ids = jnp.dtype(cache_dtype), MAX_STOP_TOKEN_IDS + len(eos_ids)
        self.executor: Executor = LocalExecutor(config, params, shapes=shapes, num_pages=num_pages * self.num_groups,
                                                num_stop_ids=self.num_stop_ids, cache_dtype=self.cache_dtype)
        self.costs = find_costs(config, params, self.cache_dtype)
        self.guard = CompileGuard()
        return_freed_memory()  # what loading left

    def dispatch(self, plan: StepPlan, tables: Mapping[str, np.ndarray]) -> Dispatched:
        """Start the program of a plan.

        Args:
            plan: what to run.
            tables: int32 [B, L] for each group of layers, the pages of each slot's row.
        """
        with self.guard:
            return Dispatched(plan, *self.executor.run(self._calls(plan, tables)) or ())

    def drop(self, key: int) -> None:
        """Forget what was saved of a row."""
        self.executor.run([ProgramCall("drop", (key,))])

    def _calls(self, plan: StepPlan, tables: Mapping[str, np.ndarray]) -> Iterator[ProgramCall]:
        """A plan's calls, in the order in which they have to run."""
        for move in plan.saves:
            yield self._move_call("save", move)
        for move in plan.restores:
            yield self._move_call("restore", move)
            yield self._start_call(move.slot, row_of(move.sequence, self.eos_ids, is_alive=True))
        for group, *pages in plan.copies:
            yield ProgramCall("copy_page", tuple(np.int32(group * self.num_pages + page) for page in pages))
        for sequence in plan.started:
            yield self._start_call(sequence.slot, row_of(sequence, self.eos_ids))
        if plan.pieces:
            yield self._step_call(plan, tables, scores_prompt=any(piece.sequence.wants_prompt_logprobs for piece in plan.pieces))
        elif plan.owners:
            yield self._decode_call(plan, tables, num_rows=self._num_rows(1 + max(owner.slot for owner in plan.owners)))

    def _step_call(self, plan: StepPlan, tables: Mapping[str, np.ndarray], *, scores_prompt: bool) -> ProgramCall:
        chunk = pack_chunk(plan, num_slots=self.shapes.max_num_seqs, num_groups=self.num_groups, is_ragged=self.shapes.has_invariant_kernels)
        return ProgramCall("step", (chunk, *self._rows(plan, tables)), {"scores_prompt": scores_prompt})

    def _decode_call(self, plan: StepPlan, tables: Mapping[str, np.ndarray], *, num_rows: int) -> ProgramCall:
        return ProgramCall("decode", self._rows(plan, tables), {"num_rows": num_rows})

    def _rows(self, plan: StepPlan, tables: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """How many steps each row may take, and its pages: copies, for the next plan changes the tables while this one's program runs."""
        return plan.steps(self.shapes.max_num_seqs), {group: table.copy() for group, table in tables.items()}

    def _start_call(self, slot: int, row: Row) -> ProgramCall:
        return ProgramCall("start", (np.int32(slot), pack_slot(row, vocab=self.config.padded_vocab_size, **{STOP_IDS: self.num_stop_ids})))

    def _move_call(self, name: str, move: Move) -> ProgramCall:
        """A row's pages are numbered among those of all groups, and padded with -1."""
        pages_L, group = np.full(self.shapes.pages_per_row, -1, np.int32), move.slot * self.num_groups // self.shapes.max_num_seqs
        pages_L[:len(move.pages)] = np.array(move.pages, np.int32) + group * self.num_pages
        return ProgramCall(name, (move.key, np.int32(move.slot), pages_L))

    def _num_rows(self, num_busy: int) -> int:
        """The slots to compute so that the first ``num_busy`` are among them."""
        if self.num_groups > 1:
            return self.shapes.max_num_seqs
        return next(bucket for bucket in self.shapes.row_buckets if bucket >= num_busy)

    def warm_up(self, *, has_prompt_logprobs: bool = False) -> Iterator[str]:
        """Compile every program by running it on no rows, one for each item, which names it; afterwards a compile is unexpected.

        Rows that are in slots stay as they are.
        """
        for calls in self._warm_ups(has_prompt_logprobs):
            with self.guard:
                self.executor.run(calls)
            yield calls[0].name
        self.executor.wait()
        self.guard.arm()

    def _warm_ups(self, has_prompt_logprobs: bool) -> Iterator[list[ProgramCall]]:
        shapes = self.shapes
        tables = {ALL_LAYERS: np.full((shapes.max_num_seqs, shapes.pages_per_row), -1, np.int32)}
        for row in (NO_ROW, dataclasses.replace(NO_ROW, params=ADJUSTING)):  # in a slot beyond the last one, which JAX does not write
            yield [self._start_call(shapes.max_num_seqs, row)]
        for bucket, scores_prompt in itertools.product(shapes.buckets, sorted({False, has_prompt_logprobs})):
            yield [self._step_call(StepPlan(pieces=(), owners=(), bucket=bucket), tables, scores_prompt=scores_prompt)]
        for num_rows in shapes.row_buckets:
            yield [self._decode_call(StepPlan(pieces=(), owners=()), tables, num_rows=num_rows)]
        nothing: Any = Move(-1, None, 0, ())
        yield [self._move_call("save", nothing), self._move_call("restore", nothing), ProgramCall("copy_page", (np.int32(0), np.int32(0)))]

    def renew(self) -> None:
        """Make cache and slots anew where a program that failed has taken them with it: they are donated to each one."""
        self.executor.renew()

    def close(self) -> None:
        """Give the cache's and the parameters' memory back at once."""
        self.executor.close()
