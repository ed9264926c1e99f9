"""Programs that give a row several tokens a step, how many is not known before: every row gets the tokens that it gets one by one."""
import collections
import random

import pytest

from tests.engine.fake_device import fake_llm
from tpllm import LLM, SamplingParams
from tpllm.engine.engine import Engine
from tpllm.engine.request import Prepared, Request

VOCAB, CONTEXT = 96, 120


def expected_tokens(prompt: list[int], params: SamplingParams, index: int) -> list[int]:
    """What the fake device draws, by its definition: a hash of all tokens so far, and of the noise."""
    noise = (params.seed >> 32, params.seed & 0xFFFFFFFF, index) if params.temperature else ()
    cell, tokens, drawn = 1, list(prompt), []
    for position in range(CONTEXT):
        cell = hash((cell, tokens[position], position))
        if position >= len(prompt) - 1:
            drawn.append(hash((cell, *noise)) % VOCAB)
            tokens.append(drawn[-1])
            is_stop = drawn[-1] in params.stop_token_ids and len(drawn) > params.min_tokens
            if is_stop or len(drawn) == min(params.max_tokens, CONTEXT - len(prompt)):
                return drawn
    raise AssertionError("a row ends with its context")


def drawn_request(rng: random.Random) -> tuple[list[int], SamplingParams]:
    """A prompt of one of two beginnings, and parameters that a device without a model knows."""
    prompt = [rng.randrange(2)] * rng.choice([0, 16, 33]) + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))]
    return prompt, SamplingParams(n=rng.choice([1, 1, 1, 2, 3]), temperature=rng.choice([0, 0.7]), seed=rng.randrange(2**63),
                                  max_tokens=rng.randint(1, 60), min_tokens=rng.choice([0, 0, 1]), ignore_eos=rng.random() < 0.5,
                                  stop_token_ids=rng.sample(range(VOCAB), rng.choice([0, 0, 4])))


class Walk:
    """Random operations on an engine, whose requests are checked as they end."""

    def __init__(self, engine: Engine, seed: int):
        self.engine, self.rng, self.num_ended = engine, random.Random(seed), collections.Counter()
        self.live: dict[Request, tuple[list[int], SamplingParams]] = {}

    def run(self, num_operations: int) -> None:
        """So many operations, then all that is left to its end."""
        self.engine._pace.steps_at_once = lambda is_watched: self.rng.choice([1, 2, 8, 32])
        for _ in range(num_operations):
            self.operate()
        while self.engine.has_work:
            self.engine.step()
            self.check()
        assert not self.live
        assert self.engine.runner.executor.num_saved == 0
        assert sum(pool.num_held for pool in self.engine.scheduler.pools) == 0

    def operate(self) -> None:
        """One operation."""
        chance = self.rng.random()
        if chance < 0.12 and len(self.live) < 12:
            prompt, params = drawn_request(self.rng)
            request = self.engine.add_request("r", Prepared(None, prompt, params, self.rng.choice([0, 0, 0, -1, 1])))
            self.live[request] = prompt, params
        elif chance < 0.14 and self.live:
            self.engine.abort(self.rng.choice(list(self.live)))
        elif chance < 0.145:
            self.engine.reset_prefix_cache()
        elif self.engine.has_work:
            self.engine.step(is_watched=self.rng.random() < 0.3)
        self.check()

    def check(self) -> None:
        """The ends are the right ones, and promises are settled by what has come."""
        if not self.engine._in_flight:
            assert all(row is None or (row.least_promised, row.most_promised) == (0, 0) for row in self.engine.scheduler.slots)
        for request in [request for request in self.live if request.is_finished]:
            prompt, params = self.live.pop(request)
            for completion in request.output.outputs:
                expected = expected_tokens(prompt, params, completion.index)
                self.num_ended[completion.finish_reason] += 1
                if completion.finish_reason == "abort":
                    assert completion.token_ids == expected[:len(completion.token_ids)]
                else:
                    assert completion.token_ids == expected, completion.finish_reason


@pytest.mark.parametrize("num_operations", [1_500, pytest.param(25_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("tokens_per_step", "is_native", "seed"), [(1, True, 1), (1, False, 1), (4, True, 4), (5, False, 12)])
def test_random_operations_give_every_row_its_tokens(tokens_per_step, is_native, seed, num_operations):
    with fake_llm(is_native=is_native, num_pages=14, tokens_per_step=tokens_per_step) as llm:
        walk = Walk(llm._engine, seed)
        walk.run(num_operations)
        assert walk.num_ended["length"] > num_operations / 50
        assert min(walk.num_ended["stop"], walk.num_ended["abort"]) > num_operations / 300
        assert llm._engine.scheduler.num_preemptions > num_operations / 200
        assert llm._engine.scheduler.num_reused_tokens > num_operations / 2


def programs_of(llm: LLM) -> int:
    """How many programs a long row takes."""
    llm._engine._pace.steps_at_once = lambda is_watched: 8
    before = llm.metrics().num_programs
    output, = llm.generate([{"prompt_token_ids": [5, 6]}], SamplingParams(temperature=0, max_tokens=100))
    assert output.outputs[0].token_ids == expected_tokens([5, 6], SamplingParams(temperature=0, max_tokens=100), 0)
    return llm.metrics().num_programs - before


def test_steps_that_give_several_tokens_are_fewer_and_are_counted_as_the_device_ran_them():
    with fake_llm() as plain, fake_llm(tokens_per_step=6) as fast:
        assert programs_of(fast) < programs_of(plain)
        assert fast.metrics().num_decode_steps < 0.6 * plain.metrics().num_decode_steps
        assert plain.metrics().num_decode_steps == 100


def test_a_row_is_promised_no_more_than_what_the_programs_under_way_may_give():
    with fake_llm(tokens_per_step=6) as llm:
        engine = llm._engine
        sequence, = engine.add_request("0", Prepared(None, [5, 6], SamplingParams(temperature=0, max_tokens=100))).sequences
        for _ in range(4):
            engine.step()
            owners = [owner for dispatched, _ in engine._in_flight for owner in dispatched.plan.owners]
            assert sequence.least_promised == sum(owner.num_steps for owner in owners)
            assert sequence.most_promised == sum(owner.most for owner in owners)
        assert sequence.completion.token_ids
        assert not sequence.is_finished


def test_a_row_that_lost_its_pages_and_is_given_up_leaves_nothing_on_the_host():
    with fake_llm(is_native=False, num_pages=8) as llm:
        engine = llm._engine
        params = SamplingParams(temperature=0, max_tokens=90)
        requests = [engine.add_request(str(index), Prepared(None, [index + 1] * 20, params)) for index in range(3)]
        while engine.runner.executor.num_saved == 0:
            engine.step()
        engine.abort(*requests)
        assert engine.runner.executor.num_saved == 0
