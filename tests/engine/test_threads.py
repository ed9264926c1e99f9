"""Several threads in one LLM: each gets the tokens that it gets alone, and nobody waits for one who has left."""
import concurrent.futures
import dataclasses
import gc
import threading
import weakref

import pytest

from tests.engine.conftest import make_llm, random_prompts
from tpllm import SamplingParams
from tpllm.errors import ConfigError, TpllmError

SAMPLED = SamplingParams(temperature=0.8, max_tokens=9)


def streamed(llm, prompt, params) -> list[int]:
    return [token for delta in llm.stream(prompt, params) for token in delta.token_ids]


def iterated(llm, prompts, params) -> list[list[int]]:
    found = {int(output.request_id): output.outputs[0].token_ids for output in llm.generate_iter(prompts, params)}
    return [found[index] for index in range(len(found))]


def generated(llm, prompts, params) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def test_eight_threads_get_the_tokens_that_they_get_alone(llm):
    prompts = random_prompts(5, 40, 17, 3, 60, 9, 33, 12)
    params = [dataclasses.replace(SAMPLED, seed=index, max_tokens=3 + 2 * index) for index in range(8)]
    alone = generated(llm, prompts, params)
    barrier = threading.Barrier(8)

    def work(index):
        order = [(index + step) % 8 for step in range(8)]
        mine, ours = [prompts[i] for i in order], [params[i] for i in order]
        barrier.wait(60)
        for _ in range(2):
            assert generated(llm, mine, ours) == [alone[i] for i in order]
            assert iterated(llm, mine[:3], ours[:3]) == [alone[i] for i in order[:3]]
            assert streamed(llm, mine[0], ours[0]) == alone[order[0]]
            llm.metrics()
            llm.reset_prefix_cache()
        return index
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == list(range(8))
    assert not llm._engine.has_work
    assert llm.metrics().num_pages_used == 0


def test_a_thread_is_served_while_another_one_streams_on_and_on(llm, monkeypatch):
    monkeypatch.setattr("tpllm.engine.pace.MAX_STEPS", 1)  # so that the stream is not at its end before the thread has begun
    long, steps, has_asked = dataclasses.replace(SAMPLED, max_tokens=100, ignore_eos=True), [], threading.Event()
    deltas = llm.stream(random_prompts(4)[0], long)
    next(deltas)

    def prompts():
        yield random_prompts(6)[0]
        has_asked.set()

    def short():
        steps.extend(iterated(llm, prompts(), dataclasses.replace(SAMPLED, max_tokens=3)))
    thread = threading.Thread(target=short)
    thread.start()
    assert has_asked.wait(60)
    for _ in deltas:
        if not thread.is_alive():
            break
    else:
        pytest.fail("the short call came to an end only with the long one")
    deltas.close()
    thread.join()
    assert [len(tokens) for tokens in steps] == [3]


def test_an_iterator_left_half_way_holds_nobody_up_and_goes_on_afterwards(llm):
    prompts, params = random_prompts(*[5] * 12), dataclasses.replace(SAMPLED, seed=1)
    expected = generated(llm, prompts, params)
    left, first = llm.generate_iter(prompts, params), {}
    output = next(left)
    first[int(output.request_id)] = output.outputs[0].token_ids
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: generated(llm, prompts, params), range(3)):
            assert found == expected
    assert generated(llm, prompts, params) == expected
    first |= {int(output.request_id): output.outputs[0].token_ids for output in left}
    assert [first[index] for index in range(12)] == expected


def test_rows_that_run_are_not_touched_by_a_warm_up(llm, monkeypatch):
    monkeypatch.setattr("tpllm.engine.pace.MAX_STEPS", 1)  # so that they still run
    prompts, params = random_prompts(5, 40, 17), dataclasses.replace(SAMPLED, seed=1, max_tokens=40, ignore_eos=True)
    expected = generated(llm, prompts, params)
    deltas = llm.stream(prompts[0], params)
    tokens = list(next(deltas).token_ids)
    other = llm.generate_iter(prompts[1:], [params, dataclasses.replace(params, max_tokens=2)])
    assert next(other).request_id == "1"
    llm.warm_up()
    llm._engine.runner.guard.is_armed = False
    assert [output.outputs[0].token_ids for output in other] == [expected[1]]
    assert tokens + [token for delta in deltas for token in delta.token_ids] == expected[0]


def test_an_iterator_that_the_collector_closes_in_the_middle_of_a_step_ends_with_that_step(llm, monkeypatch):
    params = [dataclasses.replace(SAMPLED, seed=1)]
    expected, scheduler = generated(llm, random_prompts(7), params), llm._engine.scheduler
    iterator = llm.stream(random_prompts(5)[0], dataclasses.replace(SAMPLED, max_tokens=100, ignore_eos=True))
    next(iterator)
    cycle, left, plan = [iterator], weakref.ref(iterator), scheduler.plan
    cycle.append(cycle)
    del iterator

    def plan_and_collect(*args):
        monkeypatch.setattr(scheduler, "plan", plan)
        gc.collect()
        assert left() is None
        assert len(scheduler.running) == 1, "a row ends while its step is planned"
        return plan(*args)
    monkeypatch.setattr(scheduler, "plan", plan_and_collect)
    gc.disable()
    try:
        del cycle
        assert generated(llm, random_prompts(7), params) == expected
    finally:
        gc.enable()
    assert scheduler.plan == plan
    assert not llm._engine.has_work


def test_a_failed_step_of_one_thread_is_an_error_for_all_that_ran_and_nobody_hangs(monkeypatch):
    llm, prompts = make_llm(), random_prompts(5, 6, 7, 8)
    expected = generated(llm, prompts, dataclasses.replace(SAMPLED, seed=3))
    dispatch, num_calls = llm._engine.runner.dispatch, iter(range(10**6))

    def fail_once(*args):
        if next(num_calls) == 3:
            raise MemoryError("no room")
        return dispatch(*args)
    monkeypatch.setattr(llm._engine.runner, "dispatch", fail_once)
    barrier = threading.Barrier(4)

    def work(_):
        barrier.wait(60)
        try:
            output = llm.generate(prompts, dataclasses.replace(SAMPLED, seed=3))
        except MemoryError:
            return "raised"
        failed = [one.outputs[0].error for one in output if one.outputs[0].finish_reason == "error"]
        assert all("no room" in error for error in failed)
        assert [one.outputs[0].token_ids for one in output if one.outputs[0].error is None] == [
            tokens for tokens, one in zip(expected, output, strict=True) if one.outputs[0].error is None]
        return "failed" if failed else "fine"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    assert found.count("raised") == 1
    assert generated(llm, prompts, dataclasses.replace(SAMPLED, seed=3)) == expected
    assert llm.metrics().num_pages_used == 0


def test_closing_in_one_thread_ends_the_calls_of_the_others_with_a_clear_word():
    llm, has_begun = make_llm(), threading.Event()

    def work(index):
        try:
            for _ in range(10**6):
                for _ in llm.stream(random_prompts(5)[0], dataclasses.replace(SAMPLED, max_tokens=50)):
                    has_begun.set()
        except ConfigError as error:
            return str(error)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = [pool.submit(work, index) for index in range(4)]
        assert has_begun.wait(60)
        llm.close()
        assert [result.result(60) for result in results] == ["this LLM is closed; make a new one"] * 4
    llm.close()
    with pytest.raises(TpllmError, match="closed"):
        llm.metrics()
