"""Random operations on scheduler and pool: no page leaks or is written by two rows, and everything ends.

Two things run: a hypothesis state machine, which shrinks what it finds, and one long walk of 100 000 operations.
"""
import collections
import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tpllm import SamplingParams
from tpllm.engine.plan import StepPlan
from tpllm.engine.request import Request, Sequence, new_request
from tpllm.engine.scheduler import Scheduler
from tpllm.engine.shapes import EngineShapes

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


SETUPS = (Setup(), Setup(swaps=True), Setup(is_native=False, swaps=True), Setup(num_groups=2, num_pages=11), Setup(num_slots=1, num_pages=10),
          Setup(is_native=False, swaps=True, num_groups=2), Setup(num_slots=8, num_pages=30, chunk=64), Setup(num_slots=16, chunk=16))


class World:
    """A scheduler and a device that only remembers which tokens lie in which page.

    A token's value is made of its row and position, so that what a step would read can be compared with what the row's context is.
    """

    def __init__(self, setup: Setup):
        shapes = EngineShapes(max_num_seqs=setup.num_slots, max_model_len=MAX_LEN, prefill_chunk=setup.chunk, page_size=PAGE,
                              has_invariant_kernels=setup.is_native)
        self.scheduler = Scheduler(shapes, num_pages=setup.num_pages, num_groups=setup.num_groups, swaps=setup.swaps)
        self.max_len = min(MAX_LEN, setup.num_pages * PAGE)
        self.memory = np.full((setup.num_groups, setup.num_pages, PAGE), -1)
        self.in_flight: collections.deque[StepPlan] = collections.deque()
        self.requests: list[Request] = []
        self.num_requests = 0

    def add(self, prompt: list[int], *, n: int, max_tokens: int, priority: int) -> None:
        """Queue a request."""
        self.num_requests += 1
        request = new_request(str(self.num_requests), None, prompt[:self.max_len - 1], params=SamplingParams(n=n, max_tokens=max_tokens), seed=0,
                              max_len=self.max_len, tokenizer=None, priority=priority, number=self.num_requests)
        self.requests.append(request)
        for sequence in request.sequences:
            self.scheduler.add(sequence)

    def dispatch(self, max_steps: int, token_budget: int | None) -> None:
        """Plan a program and do what it does to the pages, at once: a device runs programs in order."""
        plan = self.scheduler.plan(max_steps, token_budget)
        if plan is None:
            return
        for group, sequence, pages in plan.saves:
            sequence.saved = self.memory[group, list(pages)].copy()
        for group, sequence, pages in plan.restores:
            self.memory[group, list(pages)], sequence.saved = sequence.saved, None
        for group, source, target in plan.copies:
            self.memory[group, target] = self.memory[group, source]
        writes = [(piece.sequence, position) for piece in plan.pieces for position in range(piece.start, piece.start + piece.count)]
        starts = {id(owner.sequence): owner.sequence.prompt_len + owner.sequence.num_dispatched - 1 for owner in plan.owners}
        is_completed = {id(piece.sequence) for piece in plan.pieces}
        writes += [(owner.sequence, position) for owner in plan.owners if id(owner.sequence) not in is_completed
                   for position in self._steps(owner.sequence, starts[id(owner.sequence)], plan.num_steps)]
        owner_of_page: dict[tuple[int, int], Sequence] = {}
        for sequence, position in writes:
            group, page = self.place(sequence, position)
            for row in self.scheduler.slots:  # rows that share a page which is being filled read from it what they would have written
                if row is not None and row is not sequence and self.group(row) == group and page in row.pages:
                    assert row.pages[position // PAGE] == page
                    assert self.value(row, position) == self.value(sequence, position), "a shared page is written to"
            assert owner_of_page.setdefault((group, page), sequence) is sequence, "two rows write to one page"
            self.memory[group, page, position % PAGE] = self.value(sequence, position)
        for sequence, position in writes:  # what attention reads
            group = self.place(sequence, position)[0]
            for earlier in range(0, position + 1, 7):
                page = sequence.pages[earlier // PAGE]
                assert self.memory[group, page, earlier % PAGE] == self.value(sequence, earlier), "a row reads what is not its own"
        self.in_flight.append(plan)

    def _steps(self, sequence: Sequence, stop: int, num_steps: int) -> range:
        taken = min(num_steps, sequence.max_new_tokens)
        return range(max(stop - taken, sequence.prompt_len), min(stop, sequence.prompt_len + sequence.max_new_tokens - 1))

    def place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        """(group, page) of a row's token, which the table knows too."""
        group, page = self.group(sequence), sequence.pages[position // PAGE]
        assert self.scheduler.table[sequence.slot, position // PAGE] == page
        return group, page

    def group(self, sequence: Sequence) -> int:
        """The data group of a row's slot."""
        return sequence.slot * self.memory.shape[0] // len(self.scheduler.slots)

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
        plan = self.in_flight.popleft()
        for owner in plan.owners:
            for _ in range(plan.num_steps if owner.is_current else 0):
                sequence = owner.sequence
                token = self.drawn(sequence, sequence.context_len)
                sequence.push(token, 0.0, None)
                is_full = len(sequence.completion.token_ids) >= sequence.max_new_tokens
                if is_full or token % stops_at == 0:
                    sequence.finish("length" if is_full else "stop")
                    self.scheduler.release(sequence)
                    break
            self.scheduler.commit(owner.sequence)

    def abort(self, index: int) -> None:
        """End a request now."""
        live = [request for request in self.requests if not request.is_finished]
        for sequence in live[index % len(live)].sequences if live else ():
            if not sequence.is_finished:
                sequence.finish("abort")
                self.scheduler.release(sequence)

    def check(self) -> None:
        """What holds at any time."""
        for group, pool in enumerate(self.scheduler.pools):
            held = collections.Counter(page for slot, row in enumerate(self.scheduler.slots) if row is not None
                                       and slot * len(self.scheduler.pools) // len(self.scheduler.slots) == group for page in row.pages)
            assert [held[page] for page in range(pool.num_pages)] == pool.num_references, "pages leak"
            assert pool.num_available + len(held) == pool.num_pages
            assert pool.num_held == len(held)
        for slot, row in enumerate(self.scheduler.slots):
            used = self.scheduler.table[slot][self.scheduler.table[slot] >= 0].tolist()
            assert used == ([] if row is None else row.pages)
            assert row is None or not row.is_finished
        waiting = self.scheduler.waiting
        assert [row.order for row in waiting] == sorted(row.order for row in waiting)
        assert all(not row.pages and row.slot is None for row in waiting)
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
