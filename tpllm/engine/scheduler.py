"""The choice of what runs next for the rows in their slots."""
from tpllm.engine.plan import PlanBuilder, StepPlan
from tpllm.engine.request import Sequence
from tpllm.engine.rows import Rows
from tpllm.engine.shapes import EngineShapes

MAX_PREFILLS_IN_A_ROW = 4  # chunks that run before decoding rows get a step, where one program cannot do both
MIN_WASTE = 32  # padding of a chunk, in tokens, up to which a second pass over the weights would cost more


class Scheduler(Rows):
    """The choice between prefill and decode; arguments and attributes are those of :class:`.Rows`."""

    def __init__(self, shapes: EngineShapes, *, num_groups: int = 1, **options):
        self._mixes = shapes.has_invariant_kernels and 2 * shapes.max_num_seqs // num_groups <= shapes.prefill_chunk
        self._prefills_in_a_row = 0
        super().__init__(shapes, num_groups=num_groups, **options)

    def plan(self, max_steps: int, token_budget: int | None = None) -> StepPlan | None:
        """The next program, or None where nothing can run before results are read.

        Args:
            max_steps: the most decode steps of one program while no row waits for a slot.
            token_budget: the most tokens of a program that prefills while other rows decode; None for the largest chunk.
        """
        self._builder = PlanBuilder()
        self._admit()
        plan = self._plan_mixed(token_budget) if self._mixes else self._plan_chunk(may_repeat=token_budget is None)
        plan = plan or self._plan_decode(max_steps)
        self._prefills_in_a_row = self._prefills_in_a_row + 1 if plan.pieces else 0
        return None if plan.is_empty else plan

    # --- the three kinds of program ---------------------------------------------------------------------------------------------------
    def _plan_mixed(self, token_budget: int | None) -> StepPlan | None:
        """A step for every decoding row, and as much of the contexts that are still to be computed as fits beside them."""
        rows = self.running
        prefilling = [row for row in rows if row.is_prefilling]
        if not prefilling:
            return None
        decoding = [row for row in rows if row.may_go_on]
        used = [0] * self.num_groups
        for row in decoding:
            used[self._group(row)] += 1
        size = self.shapes.buckets[-1]
        if token_budget is not None and decoding:
            size = max(self.shapes.bucket_below(token_budget), self.shapes.bucket_for(2 * max(used)))
        is_blocked = [False] * self.num_groups  # a row without pages lets nobody pass who came later
        for row in rows:
            if row.slot is None:  # it has just lost it
                continue
            group = self._group(row)
            if row.may_go_on:
                self._go_on(row, 1)
            elif row.is_prefilling and not is_blocked[group] and used[group] < size:
                count = self._begin(row) and self._piece_size(row, used[group], size, is_last=row is prefilling[-1])
                is_blocked[group] = not count
                used[group] += self._compute(row, count) if count else 0
        return self._builder.plan(bucket=self.shapes.bucket_for(max(used)) if self._builder.pieces else 0)

    def _plan_chunk(self, *, may_repeat: bool) -> StepPlan | None:
        """One chunk for the first row of each data group whose context is still to be computed."""
        is_decoding = any(row is not None and row.may_go_on for row in self.slots)
        if is_decoding and self._prefills_in_a_row >= (MAX_PREFILLS_IN_A_ROW if may_repeat else 1):
            return None
        kind, seen = None, set()
        for row in self.running:
            if row.slot is None or not row.is_prefilling or self._group(row) in seen:
                continue
            seen.add(self._group(row))
            if not self._begin(row):
                continue
            own = self.shapes.bucket_for(row.prefill_len - row.num_computed), row.wants_prompt_logprobs
            kind = kind or own
            if own == kind:  # a row's program must not depend on its neighbours
                self._compute(row, min(kind[0], row.prefill_len - row.num_computed))
        return self._builder.plan(bucket=kind[0]) if self._builder.pieces else None

    def _plan_decode(self, max_steps: int) -> StepPlan:
        """Some steps for every row that may go on."""
        decoding = [row for row in self.running if row.may_go_on]
        if not decoding:
            return self._builder.plan()
        if self.waiting or any(row.is_prefilling for row in self.running):
            max_steps = min(max_steps, max(1, -(-min(row.num_sure_tokens for row in decoding) // self.tokens_per_step)))
        num_steps = min(max_steps, max(row.num_left for row in decoding))
        while num_steps > 1 and not self._has_pages_for(decoding, num_steps):
            num_steps //= 2
        for row in decoding:
            if row.slot is not None:
                self._go_on(row, num_steps)
        return self._builder.plan()

    def _piece_size(self, sequence: Sequence, used: int, size: int, *, is_last: bool) -> int:
        """How many tokens of a row's context go into a program of at most ``size`` tokens that already has ``used``."""
        rest = sequence.prefill_len - sequence.num_computed
        if used + rest > size or not is_last:
            return min(rest, size - used)
        bucket = self.shapes.bucket_for(used + rest)
        smaller = self.shapes.bucket_below(bucket - 1)
        is_wasteful = bucket - used - rest > max(MIN_WASTE, bucket // 4) and smaller > used
        return smaller - used if is_wasteful else rest
