"""What runs next: host integers only, no device, no clock.

Rows wait in order of priority, then arrival. A row that gets a slot takes pages for its whole context at once, further ones as it grows, and
gives all of them back when it ends. Where pages run out, the last row in that order loses its own and waits again.
"""
import bisect

import numpy as np

from tpllm.engine.page_pool import PagePool
from tpllm.engine.plan import Draft, Piece, StepPlan
from tpllm.engine.prefix_cache import PrefixCache
from tpllm.engine.request import Sequence
from tpllm.engine.shapes import EngineShapes

MAX_PREFILLS_IN_A_ROW = 4  # chunks before rows that are already decoding get a step, where one program does not serve both
MIN_WASTE = 32  # padded tokens of a chunk that are not worth a second pass over the weights


class Scheduler:
    """Slots, pages, the queue before them, and the choice between prefill and decode.

    Args:
        shapes: the engine's sizes.
        num_pages: of each data group.
        num_groups: data groups the slots are cut into, in order; each has pages of its own.
        caches_prefixes: whether rows share the pages of what their contexts have in common.
        depends_on_prompt_len: whether keys and values depend on the length of the prompt.
        swaps: whether a row that loses its pages gets their content back from the host, and does not compute it again.

    Attributes:
        table: int32 [B, L], the pages of each slot's row; -1 where there is none.
        num_preemptions: how often a row lost its pages.
        num_context_tokens, num_reused_tokens: of the rows that began: all, and those whose pages they shared.
    """

    def __init__(self, shapes: EngineShapes, *, num_pages: int, num_groups: int = 1, caches_prefixes: bool = True,
                 depends_on_prompt_len: bool = False, swaps: bool = False):
        self.shapes, self.num_groups, self.swaps = shapes, num_groups, swaps
        self.slots: list[Sequence | None] = [None] * shapes.max_num_seqs
        self.waiting: list[Sequence] = []
        self.pools = [PagePool(num_pages) for _ in range(num_groups)]
        self.prefixes = [PrefixCache(pool, page_size=shapes.page_size, granularity=shapes.shared_multiple, is_enabled=caches_prefixes,
                                     depends_on_prompt_len=depends_on_prompt_len) for pool in self.pools]
        self.table = np.full((shapes.max_num_seqs, shapes.pages_per_row), -1, np.int32)
        self.num_preemptions = self.num_context_tokens = self.num_reused_tokens = 0
        self._mixes = shapes.has_invariant_kernels and 2 * shapes.max_num_seqs // num_groups <= shapes.prefill_chunk
        self._prefills_in_a_row = 0
        self._draft = Draft()

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        bisect.insort(self.waiting, sequence, key=lambda row: row.order)

    def plan(self, max_steps: int, token_budget: int | None = None) -> StepPlan | None:
        """The next program, or None where nothing can run before results are read.

        Args:
            max_steps: decode steps to run in one go while no row waits for them to end.
            token_budget: most tokens of a program that prefills while other rows decode; None for the largest chunk.
        """
        self._draft = Draft()
        self._admit()
        plan = self._plan_mixed(token_budget) if self._mixes else self._plan_chunk(may_repeat=token_budget is None)
        plan = plan or self._plan_decode(max_steps)
        self._prefills_in_a_row = self._prefills_in_a_row + 1 if plan.pieces else 0
        return None if plan.is_empty else plan

    def commit(self, sequence: Sequence) -> None:
        """Take note of the tokens that a row got: its full pages can be shared."""
        if self.shapes.has_invariant_kernels and sequence.slot is not None:
            self.prefixes[self._group(sequence)].remember(sequence, min(sequence.num_computed, sequence.context_len - 1))

    def release(self, sequence: Sequence) -> None:
        """Free slot and pages of a sequence that has ended, or take it out of the queue. What one leaves that failed is not shared."""
        if sequence.slot is not None:
            if sequence.completion.finish_reason == "error":
                self.pools[self._group(sequence)].forget(sequence.pages)
            else:
                self.commit(sequence)
            self._leave(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def reset_prefix_cache(self) -> None:
        """Forget what every page holds."""
        for pool in self.pools:
            pool.forget_all()

    @property
    def has_work(self) -> bool:
        """Whether any sequence is queued or in a slot."""
        return bool(self.waiting) or any(sequence is not None for sequence in self.slots)

    @property
    def running(self) -> list[Sequence]:
        """The rows in slots, first those that come first."""
        return sorted((sequence for sequence in self.slots if sequence is not None), key=lambda row: row.order)

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
        return self._draft.plan(bucket=self.shapes.bucket_for(max(used)) if self._draft.pieces else 0)

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
        return self._draft.plan(bucket=kind[0]) if self._draft.pieces else None

    def _plan_decode(self, max_steps: int) -> StepPlan:
        """Some steps for every row that may go on."""
        decoding = [row for row in self.running if row.may_go_on]
        if not decoding:
            return self._draft.plan()
        if self.waiting or any(row.is_prefilling for row in self.running):
            max_steps = min(max_steps, max(1, min(row.num_sure_steps for row in decoding)))
        num_steps = min(max_steps, max(row.max_new_tokens - row.num_dispatched for row in decoding))
        while num_steps > 1 and not self._has_pages_for(decoding, num_steps):
            num_steps //= 2
        for row in decoding:
            if row.slot is not None:
                self._go_on(row, num_steps)
        return self._draft.plan(num_steps=num_steps)

    # --- rows -------------------------------------------------------------------------------------------------------------------------
    def _admit(self) -> None:
        """Give free slots to the rows that come first."""
        for slot, holder in enumerate(self.slots):
            if holder is None and self.waiting:
                sequence = self.waiting.pop(0)
                sequence.slot, self.slots[slot] = slot, sequence
                sequence.prefill_len, sequence.num_computed = sequence.context_len, 0
                sequence.num_dispatched, sequence.num_pages_known = len(sequence.completion.token_ids), 0
        for sequence in self.slots:
            if sequence is not None and sequence.saved is not None and not sequence.pages:
                self._restore(sequence)

    def _begin(self, sequence: Sequence) -> bool:
        """Whether a row has pages for its context; one without takes them, those of a known beginning first."""
        if sequence.pages:
            return True
        if sequence.saved is not None:
            return False
        pool, (shared, num_tokens) = self.pools[self._group(sequence)], self._find_shared(sequence)
        if shared is None:
            return False
        for page in shared:
            pool.hold(page)
        sequence.pages, sequence.num_computed = list(shared), num_tokens
        if not self._reserve(sequence, num_tokens, sequence.prefill_len, spare=self._num_earlier(sequence)):
            pool.release(sequence.pages)
            sequence.pages, sequence.num_computed = [], 0
            return False
        if sequence is sequence.request.sequences[0] and not sequence.num_preemptions:
            sequence.request.output.num_cached_tokens = num_tokens
        self.num_context_tokens += sequence.prefill_len
        self.num_reused_tokens += num_tokens
        self._draft.started.append(sequence)
        return True

    def _find_shared(self, sequence: Sequence) -> tuple[list[int] | None, int]:
        """(pages, tokens in them) that a row shares from the start; None where it is worth waiting for the first of its ``n``."""
        size, first = self.shapes.page_size, sequence.request.sequences[0]
        if sequence is not first and first.slot is not None and self._group(first) == self._group(sequence) and not first.is_finished:
            if first.is_prefilling or self._draft.computes(first):
                return None, 0
            if self.shapes.shared_multiple == size and not sequence.completion.token_ids:
                num_tokens = sequence.prompt_len - 1
                return first.pages[:-(-num_tokens // size)], num_tokens
        pages = self.prefixes[self._group(sequence)].find(sequence)
        return pages, len(pages) * size

    def _restore(self, sequence: Sequence) -> None:
        """Give a row that was saved its pages again; it goes on decoding."""
        if self._reserve(sequence, 0, sequence.context_len, spare=self._num_earlier(sequence)):  # a token's place more than it had: it goes on
            sequence.num_computed = sequence.prefill_len
            self._draft.started.append(sequence)
            self._draft.restores.append((self._group(sequence), sequence, tuple(sequence.pages[:self._num_saved_pages(sequence)])))

    def _piece_size(self, sequence: Sequence, used: int, size: int, *, is_last: bool) -> int:
        """How many tokens of a row's context go into a program that has ``used`` of at most ``size``."""
        rest = sequence.prefill_len - sequence.num_computed
        if used + rest > size or not is_last:
            return min(rest, size - used)
        bucket = self.shapes.bucket_for(used + rest)
        smaller = self.shapes.bucket_below(bucket - 1)
        is_wasteful = bucket - used - rest > max(MIN_WASTE, bucket // 4) and smaller > used
        return smaller - used if is_wasteful else rest

    def _compute(self, sequence: Sequence, count: int) -> int:
        """Plan the next ``count`` tokens of a row's context; returns their number."""
        self._draft.pieces.append(Piece(sequence, sequence.slot, sequence.num_computed, count))
        sequence.num_computed += count
        self.prefixes[self._group(sequence)].remember(sequence, min(sequence.num_computed, self._prefilled_len(sequence)))
        if not sequence.is_prefilling:
            sequence.num_dispatched = len(sequence.completion.token_ids) + 1
            self._draft.give_tokens(sequence)
        return count

    def _prefilled_len(self, sequence: Sequence) -> int:
        """How much of a context a prefill gives the bits that any other prefill would give it."""
        return sequence.prefill_len if self.shapes.has_invariant_kernels else sequence.prompt_len

    def _go_on(self, sequence: Sequence, num_steps: int) -> None:
        """Plan decode steps of a row, or take its slot where there are no pages for them."""
        start, stop = sequence.positions_of(num_steps)
        if not self._reserve(sequence, start, stop):
            self._preempt(sequence)
            return
        sequence.num_computed = stop
        sequence.num_dispatched += stop - start
        self._draft.give_tokens(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        keeps = self.swaps and not sequence.is_prefilling and sequence.completion.token_ids
        if keeps:
            self._draft.saves.append((self._group(sequence), sequence, tuple(sequence.pages[:self._num_saved_pages(sequence)])))
        self._leave(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        sequence.saved = () if keeps else None
        self.add(sequence)

    def _num_saved_pages(self, sequence: Sequence) -> int:
        """Of the tokens that are in the cache: all but the last."""
        return -(-(sequence.context_len - 1) // self.shapes.page_size)

    def _leave(self, sequence: Sequence) -> None:
        self.pools[self._group(sequence)].release(sequence.pages)
        self.table[sequence.slot] = -1
        self.slots[sequence.slot] = None
        sequence.pages, sequence.slot, sequence.num_pages_known = [], None, 0

    # --- pages ------------------------------------------------------------------------------------------------------------------------
    def _reserve(self, sequence: Sequence, start: int, stop: int, *, spare: int = 0) -> bool:
        """Own pages for positions ``start`` to ``stop``, which are to be written, and leave ``spare`` ones; rows that come later lose theirs
        for it."""
        pool, size = self.pools[self._group(sequence)], self.shapes.page_size
        first, num_missing = start // size, max(0, -(-stop // size) - len(sequence.pages))
        is_shared = first < len(sequence.pages) and pool.is_shared(sequence.pages[first])
        while pool.num_available < num_missing + is_shared + spare:
            victim = self._last_holder(self._group(sequence))
            if victim is None or victim.order <= sequence.order:
                return False
            self._preempt(victim)
            is_shared = first < len(sequence.pages) and pool.is_shared(sequence.pages[first])
        if is_shared:
            old, sequence.pages[first] = sequence.pages[first], pool.take()
            pool.release([old])
            self._draft.copies.append((self._group(sequence), old, sequence.pages[first]))
        sequence.pages += [pool.take() for _ in range(num_missing)]
        self.table[sequence.slot, :len(sequence.pages)] = sequence.pages
        return True

    def _has_pages_for(self, rows: list[Sequence], num_steps: int) -> bool:
        needed, size = [0] * self.num_groups, self.shapes.page_size
        for row in rows:
            needed[self._group(row)] += max(0, -(-row.positions_of(num_steps)[1] // size) - len(row.pages)) + 1  # a shared page, perhaps
        return all(pool.num_available >= count for pool, count in zip(self.pools, needed, strict=True))

    def _num_earlier(self, sequence: Sequence) -> int:
        """Rows with pages that come before a row: each may soon need another page, which the row must not take to lose it again."""
        return sum(bool(row.pages) and row.order < sequence.order and self._group(row) == self._group(sequence) for row in self.running)

    def _last_holder(self, group: int) -> Sequence | None:
        """The row with pages that comes last and has no part in the program being planned."""
        holders = [row for row in self.running if row.pages and self._group(row) == group and not self._draft.has(row)]
        return holders[-1] if holders else None

    def _group(self, sequence: Sequence) -> int:
        return sequence.slot * self.num_groups // len(self.slots)
