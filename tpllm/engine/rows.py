"""Rows in their slots, those that wait for one, and the pages they hold: host integers only, no device, no clock.

Rows wait in order of priority, then arrival. A row that gets a slot takes pages for its whole context at once, further ones as it grows, and
gives all of them back when it ends. Where pages run out, the last row in that order loses its own and waits again.
"""
import bisect
import itertools

import numpy as np

from tpllm.engine.pages import PagePool, PrefixCache
from tpllm.engine.plan import Move, Owner, Piece, PlanBuilder
from tpllm.engine.request import Sequence
from tpllm.engine.shapes import EngineShapes
from tpllm.model.config import ALL_LAYERS


class Rows:
    """Slots, the queue before them, and pages.

    Args:
        shapes: the engine's sizes.
        num_pages: pages of each data group.
        num_groups: data groups that the slots are cut into, in order; each has pages of its own.
        caches_prefixes: whether rows share the pages of a common beginning of their contexts.
        depends_on_prompt_len: whether keys and values depend on the length of the prompt.
        swaps: whether a row that loses its pages gets their content back from the host, and does not compute it again.
        tokens_per_step: the most tokens that a decode step gives a row; it gives at least one.

    Attributes:
        tables: int32 [B, L] for each group of layers, the pages of each slot's row; -1 where there is none.
        num_preemptions: how often a row lost its pages.
        num_context_tokens, num_reused_tokens: tokens in the contexts of the rows that began, and how many of them lay in shared pages.
    """

    def __init__(self, shapes: EngineShapes, *, num_pages: int, num_groups: int = 1, caches_prefixes: bool = True,
                 depends_on_prompt_len: bool = False, swaps: bool = False, tokens_per_step: int = 1):
        self.shapes, self.num_pages, self.num_groups, self.swaps, self.tokens_per_step = shapes, num_pages, num_groups, swaps, tokens_per_step
        self._caches_prefixes, self._depends_on_prompt_len = caches_prefixes, depends_on_prompt_len
        self.num_preemptions = self.num_context_tokens = self.num_reused_tokens = 0
        self._keys_of_saved = itertools.count()
        self.reset()

    def reset(self) -> None:
        """Forget all rows and what pages hold; only the counts stay."""
        shapes = self.shapes
        self.slots: list[Sequence | None] = [None] * shapes.max_num_seqs
        self.waiting: list[Sequence] = []
        self.pools = [PagePool(self.num_pages) for _ in range(self.num_groups)]
        self.prefixes = [PrefixCache(pool, page_size=shapes.page_size, granularity=shapes.shared_multiple, is_enabled=self._caches_prefixes,
                                     depends_on_prompt_len=self._depends_on_prompt_len) for pool in self.pools]
        self.tables = {ALL_LAYERS: np.full((shapes.max_num_seqs, shapes.pages_per_row), -1, np.int32)}
        self._builder = PlanBuilder()

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        bisect.insort(self.waiting, sequence, key=lambda row: row.order)

    def commit(self, owner: Owner) -> None:
        """Settle a program's promise to a row once its tokens have come, however many; full pages of the row can be shared from here on."""
        owner.sequence.promise(-owner.num_steps, -owner.most)
        self._share_full_pages(owner.sequence)

    def _share_full_pages(self, sequence: Sequence) -> None:
        if self.shapes.has_invariant_kernels and sequence.slot is not None:
            self.prefixes[self._group(sequence)].remember(sequence, min(sequence.num_computed, sequence.context_len - 1))

    def release(self, sequence: Sequence) -> None:
        """Free slot and pages of a sequence that has ended, or take it out of the queue. Pages of one that failed are not shared."""
        if sequence.slot is not None:
            if sequence.completion.finish_reason == "error":
                self.pools[self._group(sequence)].forget(sequence.pages)
            else:
                self._share_full_pages(sequence)
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
        """The rows in slots, in their order."""
        return sorted((sequence for sequence in self.slots if sequence is not None), key=lambda row: row.order)

    # --- a row's way: into its slot, on, out of it -----------------------------------------------------------------------------------
    def _admit(self) -> None:
        """Give free slots to the rows that wait, in their order."""
        for slot, holder in enumerate(self.slots):
            if holder is None and self.waiting:
                sequence = self.waiting.pop(0)
                sequence.slot, self.slots[slot] = slot, sequence
                sequence.prefill_len, sequence.num_computed = sequence.context_len, 0
                sequence.num_pages_known = 0
        for sequence in self.slots:
            if sequence is not None and sequence.saved is not None and not sequence.pages:
                self._restore(sequence)

    def _begin(self, sequence: Sequence) -> bool:
        """Give a row pages for its context, if it has none: shared ones for a known beginning, then new ones. Returns whether it has them."""
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
        self._builder.started.append(sequence)
        return True

    def _find_shared(self, sequence: Sequence) -> tuple[list[int] | None, int]:
        """(pages, tokens in them) that a row shares from the start; None where it should wait for the first of its ``n`` to be computed."""
        size, first = self.shapes.page_size, sequence.request.sequences[0]
        if sequence is not first and first.slot is not None and self._group(first) == self._group(sequence) and not first.is_finished:
            if first.is_prefilling or self._builder.computes(first):
                return None, 0
            if self.shapes.shared_multiple == size and not sequence.completion.token_ids:
                num_tokens = sequence.prompt_len - 1
                return first.pages[:-(-num_tokens // size)], num_tokens
        pages = self.prefixes[self._group(sequence)].find(sequence)
        return pages, len(pages) * size

    def _restore(self, sequence: Sequence) -> None:
        """Give a row that was saved pages again, and plan to copy their content back; it goes on decoding."""
        stop = sequence.positions_of(self.tokens_per_step)[1]  # with places for a step, so that it goes on
        if self._reserve(sequence, 0, stop, spare=self._num_earlier(sequence)):
            sequence.num_computed = sequence.prefill_len
            self._builder.restores.append(self._move(sequence, sequence.saved))
            sequence.saved = None

    def _compute(self, sequence: Sequence, count: int) -> int:
        """Plan the next ``count`` tokens of a row's context; returns their number."""
        self._builder.pieces.append(Piece(sequence, sequence.slot, sequence.num_computed, count))
        sequence.num_computed += count
        self.prefixes[self._group(sequence)].remember(sequence, min(sequence.num_computed, self._prefilled_len(sequence)))
        if not sequence.is_prefilling:
            self._builder.give_tokens(sequence)
        return count

    def _prefilled_len(self, sequence: Sequence) -> int:
        """How many tokens of a context get the same bits in any prefill."""
        return sequence.prefill_len if self.shapes.has_invariant_kernels else sequence.prompt_len

    def _go_on(self, sequence: Sequence, num_steps: int) -> None:
        """Plan decode steps of a row, or take its slot where there are no pages for them."""
        start, stop = sequence.positions_of(num_steps * self.tokens_per_step)
        if not self._reserve(sequence, start, stop):
            self._preempt(sequence)
            return
        sequence.num_computed = stop
        self._builder.give_tokens(sequence, min(num_steps, sequence.num_left), self.tokens_per_step)

    def _preempt(self, sequence: Sequence) -> None:
        if self.swaps and not sequence.is_prefilling and sequence.completion.token_ids:
            sequence.saved = next(self._keys_of_saved)
            self._builder.saves.append(self._move(sequence, sequence.saved))
        self._leave(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.add(sequence)

    def _move(self, sequence: Sequence, key: int) -> Move:
        """A move of the pages that hold the tokens in the cache: all tokens but the last."""
        num_pages = -(-(sequence.context_len - 1) // self.shapes.page_size)
        return Move(key, sequence, sequence.slot, tuple(sequence.pages[:num_pages]))

    def _leave(self, sequence: Sequence) -> None:
        self.pools[self._group(sequence)].release(sequence.pages)
        for table in self.tables.values():
            table[sequence.slot] = -1
        self.slots[sequence.slot] = None
        sequence.pages, sequence.slot, sequence.num_pages_known, sequence.least_promised, sequence.most_promised = [], None, 0, 0, 0

    # --- pages ------------------------------------------------------------------------------------------------------------------------
    def _reserve(self, sequence: Sequence, start: int, stop: int, *, spare: int = 0) -> bool:
        """Make sure that a row alone holds the pages of positions ``start`` to ``stop``, which will be written, and that ``spare`` pages are left;
        rows later in the order lose theirs for it. Returns whether there were enough."""
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
            self._builder.copies.append((self._group(sequence), old, sequence.pages[first]))
        sequence.pages += [pool.take() for _ in range(num_missing)]
        for table in self.tables.values():
            table[sequence.slot, :len(sequence.pages)] = sequence.pages
        return True

    def _has_pages_for(self, rows: list[Sequence], num_steps: int) -> bool:
        needed, size = [0] * self.num_groups, self.shapes.page_size
        for row in rows:
            stop = row.positions_of(num_steps * self.tokens_per_step)[1]
            needed[self._group(row)] += max(0, -(-stop // size) - len(row.pages)) + 1  # a shared page, perhaps
        return all(pool.num_available >= count for pool, count in zip(self.pools, needed, strict=True))

    def _num_earlier(self, sequence: Sequence) -> int:
        """How many rows with pages come before a row: each may soon need one more page, and the row should not take it only to lose it again."""
        return sum(bool(row.pages) and row.order < sequence.order and self._group(row) == self._group(sequence) for row in self.running)

    def _last_holder(self, group: int) -> Sequence | None:
        """The row with pages that comes last and has no part in the program being planned."""
        holders = [row for row in self.running if row.pages and self._group(row) == group and not self._builder.has(row)]
        return holders[-1] if holders else None

    def _group(self, sequence: Sequence) -> int:
        return sequence.slot * self.num_groups // len(self.slots)
