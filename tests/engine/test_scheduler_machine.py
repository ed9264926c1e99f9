"""Random operations on scheduler and pool: no page leaks or is written by two rows, and everything ends.

Two things run: a hypothesis state machine, which shrinks what it finds, and one long walk of 100 000 operations.
"""
import collections
import dataclasses
import random

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tpllm import SamplingParams
from tpllm.engine.plan import Owner, StepPlan
from tpllm.engine.request import Prepared, Request, Sequence, new_request
from tpllm.engine.scheduler import Scheduler
from tpllm.engine.shapes import EngineShapes
from tpllm.model.config import ALL_LAYERS

MAX_LEN, PAGE = 160, 16


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of one scheduler."""

    num_slots: int = 4
    num_pages: int = 14
    num_groups: int = 1
    chunk: int = 32
    is_native: bool = True
    swaps: bool = False
    tokens_per_step: int = 1


SETUPS = (Setup(), Setup(swaps=True), Setup(is_native=False, swaps=True), Setup(num_groups=2, num_pages=11), Setup(num_slots=1, num_pages=10),
          Setup(is_native=False, swaps=True, num_groups=2), Setup(num_slots=8, num_pages=30, chunk=64), Setup(num_slots=16, chunk=16),
          Setup(tokens_per_step=4), Setup(tokens_per_step=3, swaps=True, is_native=False, num_groups=2), Setup(tokens_per_step=8, num_pages=30))
REJECTED = -5  # what a step leaves in the cache beyond the tokens that it gives


class World:
    """A scheduler and a device that only remembers which tokens lie in which page.

    A token's value is made of its row and position, so that what a step would read can be compared with what the row's context is. How many
    tokens a step gives is drawn; what it writes beyond them is junk.
    """

    def __init__(self, setup: Setup):
        shapes = EngineShapes(max_num_seqs=setup.num_slots, max_model_len=MAX_LEN, prefill_chunk=setup.chunk, page_size=PAGE,
                              has_invariant_kernels=setup.is_native)
        self.tokens_per_step, self.random = setup.tokens_per_step, random.Random(setup.num_slots)
        self.scheduler = Scheduler(shapes, num_pages=setup.num_pages, num_groups=setup.num_groups, swaps=setup.swaps,
                                   tokens_per_step=setup.tokens_per_step)
        self.max_len = min(MAX_LEN, setup.num_pages * PAGE)
        self.memory = np.full((setup.num_groups, setup.num_pages, PAGE), -1)
        self.in_flight: collections.deque[tuple[StepPlan, list[int]]] = collections.deque()  # with the tokens that each owner gets
        self.saved: dict[int, np.ndarray] = {}
        self.num_drawn: dict[int, int] = {}  # of each row, by its identity, as the device knows it
        self.requests: list[Request] = []
        self.num_requests = 0

    def add(self, prompt: list[int], *, n: int, max_tokens: int, priority: int) -> None:
        """Queue a request."""
        self.num_requests += 1
        prepared = Prepared(None, prompt[:self.max_len - 1], SamplingParams(n=n, max_tokens=max_tokens), priority)
        request = new_request(str(self.num_requests), prepared, seed=0, max_len=self.max_len, tokenizer=None, number=self.num_requests)
        self.requests.append(request)
        for sequence in request.sequences:
            self.scheduler.add(sequence)

    def dispatch(self, max_steps: int, token_budget: int | None) -> None:
        """Plan a program and do what it does to the pages, at once: a device runs programs in order."""
        plan = self.scheduler.plan(max_steps, token_budget)
        if plan is None:
            return
        for move in plan.saves:
            self.saved[move.key] = self.memory[self.group_of(move.slot), list(move.pages)].copy()
        for move in plan.restores:
            self.memory[self.group_of(move.slot), list(move.pages)] = self.saved.pop(move.key)
            self.num_drawn[id(move.sequence)] = len(move.sequence.completion.token_ids)
        for group, source, target in plan.copies:
            self.memory[group, target] = self.memory[group, source]
        for sequence in plan.started:
            self.num_drawn[id(sequence)] = len(sequence.completion.token_ids)
        owner_of_page: dict[tuple[int, int], Sequence] = {}
        for piece in plan.pieces:
            for position in range(piece.start, piece.start + piece.count):
                self.write(piece.sequence, position, owner_of_page)
        counts, is_completed = [], {id(piece.sequence) for piece in plan.pieces}
        for owner in plan.owners:
            counts.append(1 if id(owner.sequence) in is_completed else self.run_steps(owner, owner_of_page))
            self.num_drawn[id(owner.sequence)] += counts[-1] if id(owner.sequence) in is_completed else 0
        for piece in plan.pieces:  # what attention reads
            self.read(piece.sequence, piece.start + piece.count)
        self.in_flight.append((plan, counts))

    def run_steps(self, owner: Owner, owner_of_page: dict[tuple[int, int], Sequence]) -> int:
        """Decode steps of one row, each of which writes its drafts too; how many tokens it gets."""
        sequence, before = owner.sequence, self.num_drawn[id(owner.sequence)]
        for _ in range(owner.num_steps):
            drawn = self.num_drawn[id(sequence)]
            if drawn >= sequence.max_new_tokens:
                break
            count = min(self.random.randint(1, self.tokens_per_step), sequence.max_new_tokens - drawn)
            first = sequence.prompt_len + drawn - 1
            for position in range(first, first + self.tokens_per_step):
                if position < first + count or position // PAGE < len(sequence.pages):
                    self.write(sequence, position, owner_of_page, is_kept=position < first + count)
            self.num_drawn[id(sequence)] += count
            self.read(sequence, first + count)
        return self.num_drawn[id(sequence)] - before

    def write(self, sequence: Sequence, position: int, owner_of_page: dict[tuple[int, int], Sequence], *, is_kept: bool = True) -> None:
        """One row writes one place, which must be its own."""
        group, page = self.place(sequence, position)
        value = self.value(sequence, position) if is_kept else REJECTED
        for row in self.scheduler.slots:  # rows that share a page which is being filled read from it what they would have written
            if row is not None and row is not sequence and self.group(row) == group and page in row.pages:
                assert row.pages[position // PAGE] == page
                assert self.value(row, position) == value, "a shared page is written to"
        assert owner_of_page.setdefault((group, page), sequence) is sequence, "two rows write to one page"
        self.memory[group, page, position % PAGE] = value

    def read(self, sequence: Sequence, stop: int) -> None:
        """One row reads its context up to a position."""
        for position in (*range(0, stop, 7), *range(max(stop - self.tokens_per_step, 0), stop)):
            page = sequence.pages[position // PAGE]
            assert self.memory[self.group(sequence), page, position % PAGE] == self.value(sequence, position), "a row reads what is not its own"

    def place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        """(group, page) of a row's token, which the table knows too."""
        group, page = self.group(sequence), sequence.pages[position // PAGE]
        assert self.scheduler.tables[ALL_LAYERS][sequence.slot, position // PAGE] == page
        return group, page

    def group(self, sequence: Sequence) -> int:
        """The data group of a row's slot."""
        return self.group_of(sequence.slot)

    def group_of(self, slot: int) -> int:
        """The data group of a slot."""
        return slot * self.memory.shape[0] // len(self.scheduler.slots)

    def value(self, sequence: Sequence, position: int) -> int:
        """The token at a position: the prompt's, or the one that this row always draws there."""
        prompt = sequence.request.output.prompt_token_ids
        return prompt[position] if position < len(prompt) else self.drawn(sequence, position)

    def drawn(self, sequence: Sequence, position: int) -> int:
        """What a row draws at a position."""
        return 10_000 + 1000 * (sequence.request.number % 50) + 7 * sequence.completion.index + position

    def commit(self, stops_at: int) -> None:
        """Read the oldest program; every row that draws a multiple of ``stops_at`` stops."""
        if not self.in_flight:
            return
        plan, counts = self.in_flight.popleft()
        for owner, count in zip(plan.owners, counts, strict=True):
            sequence = owner.sequence
            if not owner.is_current:
                continue
            assert sequence.most_promised >= sequence.least_promised >= owner.num_steps
            for _ in range(count):
                token = self.drawn(sequence, sequence.context_len)
                sequence.push(token, 0.0, None)
                is_full = len(sequence.completion.token_ids) >= sequence.max_new_tokens
                if is_full or token % stops_at == 0:
                    sequence.finish("length" if is_full else "stop")
                    self.release(sequence)
                    break
            else:
                self.scheduler.commit(owner)

    def release(self, sequence: Sequence) -> None:
        """What the engine does with a row that has ended."""
        if sequence.saved is not None:
            del self.saved[sequence.saved]
        self.scheduler.release(sequence)

    def abort(self, index: int) -> None:
        """End a request now."""
        live = [request for request in self.requests if not request.is_finished]
        for sequence in live[index % len(live)].sequences if live else ():
            if not sequence.is_finished:
                sequence.finish("abort")
                self.release(sequence)

    def check(self) -> None:
        """What holds at any time."""
        for group, pool in enumerate(self.scheduler.pools):
            held = collections.Counter(page for slot, row in enumerate(self.scheduler.slots) if row is not None
                                       and slot * len(self.scheduler.pools) // len(self.scheduler.slots) == group for page in row.pages)
            assert [held[page] for page in range(pool.num_pages)] == pool.num_references, "pages leak"
            assert pool.num_available + len(held) == pool.num_pages
            assert pool.num_held == len(held)
        for slot, row in enumerate(self.scheduler.slots):
            used = self.scheduler.tables[ALL_LAYERS][slot]
            used = used[used >= 0].tolist()
            assert used == ([] if row is None else row.pages)
            assert row is None or not row.is_finished
        waiting = self.scheduler.waiting
        assert [row.order for row in waiting] == sorted(row.order for row in waiting)
        assert all(not row.pages and row.slot is None and not row.most_promised for row in waiting)
        if not self.in_flight:
            assert all(row is None or row.least_promised == row.most_promised == 0 for row in self.scheduler.slots), "a promise is not kept"
        self.requests = [request for request in self.requests if not request.is_finished]

    def drain(self) -> None:
        """Run until everything has ended, which it must."""
        for _ in range(5000):
            if not self.scheduler.has_work and not self.in_flight:
                break
            self.dispatch(4, None)
            self.commit(10**9)
        self.check()
        assert not self.scheduler.has_work
        assert all(pool.num_held == 0 for pool in self.scheduler.pools)
        assert not self.saved


def prompt_of(family: int, length: int) -> list[int]:
    """Prompts of one family begin alike and end in tokens of their own length."""
    return [*(100 * family + i for i in range(max(length - 3, 0))), *(5000 + length for _ in range(min(length, 3)))]


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, steps, ends, aborts and preempts in any order."""

    @initialize(setup=st.sampled_from(SETUPS))
    def begin(self, setup):
        self.world = World(setup)

    @precondition(lambda self: len(self.world.requests) < 30)
    @rule(family=st.integers(0, 2), length=st.integers(1, 150), n=st.sampled_from([1, 1, 1, 2, 4]), max_tokens=st.integers(1, 120),
          priority=st.sampled_from([0, 0, 0, -1, 1]))
    def add(self, family, length, n, max_tokens, priority):
        self.world.add(prompt_of(family, length), n=n, max_tokens=max_tokens, priority=priority)

    @rule(max_steps=st.integers(1, 16), token_budget=st.none() | st.sampled_from([16, 32]))
    def dispatch(self, max_steps, token_budget):
        if len(self.world.in_flight) < 2:
            self.world.dispatch(max_steps, token_budget)

    @rule(stops_at=st.integers(2, 200))
    def commit(self, stops_at):
        self.world.commit(stops_at)

    @rule(index=st.integers(0, 100))
    def abort(self, index):
        self.world.abort(index)

    @rule()
    def reset(self):
        self.world.scheduler.reset_prefix_cache()

    @invariant()
    def holds(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.drain()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)


def walk(setup: Setup, num_operations: int, seed: int) -> World:
    """Random operations, checked after each one."""
    rng, world = np.random.default_rng(seed), World(setup)
    for _ in range(num_operations):
        kind = rng.choice(5, p=[0.16, 0.4, 0.4, 0.035, 0.005])
        if kind == 0 and len(world.requests) < 30:
            world.add(prompt_of(int(rng.integers(3)), int(rng.integers(1, 150))), n=int(rng.choice([1, 1, 1, 2, 4])),
                      max_tokens=int(rng.integers(1, 120)), priority=int(rng.choice([0, 0, 0, -1, 1])))
        elif kind == 1 and len(world.in_flight) < 2:
            world.dispatch(int(rng.integers(1, 17)), [None, None, 16, 32][rng.integers(4)])
        elif kind == 2:
            world.commit(int(rng.integers(20, 400)))
        elif kind == 3:
            world.abort(int(rng.integers(100)))
        elif kind == 4:
            world.scheduler.reset_prefix_cache()
        world.check()
    world.drain()
    return world


@pytest.mark.parametrize("setup", SETUPS, ids=range(len(SETUPS)))
def test_a_short_walk_leaks_nothing_and_ends(setup):
    world = walk(setup, 2500, seed=1)
    assert world.num_requests > 10


@pytest.mark.slow
def test_100_000_random_operations_leak_nothing_and_end():
    worlds = [walk(setup, 100_000 // len(SETUPS), seed=2 + index) for index, setup in enumerate(SETUPS)]
    assert sum(world.scheduler.num_preemptions for world in worlds) > 500
    assert sum(world.scheduler.num_reused_tokens for world in worlds) > 10_000
