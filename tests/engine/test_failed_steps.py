"""After a step that failed, wherever and by whatever, the next call is right: no wrong token, no page lost, no array dead."""
import contextlib
import dataclasses
import gc
import itertools

import jax
import pytest

from tests.engine.conftest import make_llm, make_packed_llm
from tests.engine.faults import Faults, choose_places
from tpllm import SamplingParams
from tpllm.errors import TpllmError
from tpllm.tokenizer import Detokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
PROMPTS = [{"prompt_token_ids": [*range(40), 1]}, {"prompt_token_ids": [*range(40), 2]}, {"prompt_token_ids": [7, 8, 9]}]
PARAMS = [GREEDY, dataclasses.replace(GREEDY, n=2, temperature=1.0, seed=1), dataclasses.replace(GREEDY, prompt_logprobs=2)]
TIGHT = {"page_size": 16, "kv_cache_tokens": 128, "prefill_chunk_size": 32}  # rows lose their pages


def tokens_of(outputs) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def check_whole(llm, expected) -> None:
    """The engine is idle, gives the right tokens, and holds no page and no dead array."""
    assert not llm._engine.has_work
    assert tokens_of(llm.generate(PROMPTS, PARAMS)) == expected
    assert llm.metrics().num_pages_used == 0
    executor = llm._engine.runner.executor
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((executor.cache, executor.state)))


@pytest.fixture
def tight_llm(path):
    """An engine whose rows lose their pages, and are computed again or swapped."""
    return (make_packed_llm if path == "native" else make_llm)(**TIGHT)


@pytest.mark.slow
def test_wherever_a_step_fails_the_next_call_gives_the_right_tokens(tight_llm, monkeypatch):
    """The like of ``test_faults_at_every_line`` with real programs and arrays."""
    llm = tight_llm
    monkeypatch.setattr(llm._engine._pace, "steps_at_once", lambda is_watched: 8)  # not by the clock, so that each run is like the one before
    expected = tokens_of(llm.generate(PROMPTS, PARAMS))
    llm.reset_prefix_cache()
    faults = Faults(monkeypatch, llm._engine)
    llm.generate(PROMPTS, PARAMS)
    assert llm._engine.scheduler.num_preemptions > 0
    names, found = faults.names, set()
    for place, error in choose_places(names):
        llm.reset_prefix_cache()
        faults.arm(place, error)
        with contextlib.suppress(error):  # one that is a row's own ends that row, and the call goes on
            llm.generate(PROMPTS, PARAMS)
        found.add(faults.raised)
        faults.disarm()
        check_whole(llm, expected)
    assert found == set(names)
    assert {"plan", "dispatch", "step", "decode", "device_get", "push"} <= found


def fail_at(monkeypatch, owner, name: str, number: int, error: BaseException, *, is_after: bool = False) -> None:
    """Make one call of a function raise."""
    function, numbers = getattr(owner, name), itertools.count(1)

    def call(*args, **options):
        is_due = next(numbers) == number
        if is_due and not is_after:
            raise error
        result = function(*args, **options)
        if is_due:
            raise error
        return result
    monkeypatch.setattr(owner, name, call)


def test_what_else_was_unfinished_ends_with_the_error_and_says_so(llm, monkeypatch):
    expected = tokens_of(llm.generate(PROMPTS, PARAMS))
    monkeypatch.setattr(llm._engine._pace, "steps_at_once", lambda is_watched: 2)
    other, streamed = llm.generate_iter(PROMPTS, [dataclasses.replace(GREEDY, max_tokens=2), GREEDY, GREEDY]), llm.stream(PROMPTS[0], GREEDY)
    next(other)
    next(streamed)
    fail_at(monkeypatch, llm._engine.runner, "dispatch", 1, MemoryError("no room on the device"), is_after=True)
    with pytest.raises(MemoryError):
        llm.generate(PROMPTS, PARAMS)
    left = list(other)
    assert [output.outputs[0].finish_reason for output in left] == ["error"] * 2
    assert all("no room on the device" in output.outputs[0].error for output in left)
    with pytest.raises(TpllmError, match="no room on the device"):
        next(streamed)
    check_whole(llm, expected)


@pytest.mark.parametrize("program", ["start", "step", "decode"])
def test_a_cache_that_a_failed_program_took_along_is_made_anew(llm, monkeypatch, program):
    expected, runner = tokens_of(llm.generate(PROMPTS, PARAMS)), llm._engine.runner
    programs, before = runner.executor.programs, sum(array.nbytes for array in jax.live_arrays())

    def take_and_fail(*args, **options):
        getattr(programs, program)(*args, **options)
        raise RuntimeError("RESOURCE_EXHAUSTED")
    monkeypatch.setattr(runner.executor, "programs", dataclasses.replace(programs, **{program: take_and_fail}))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            llm.generate(PROMPTS, PARAMS)
    monkeypatch.setattr(runner.executor, "programs", programs)
    check_whole(llm, expected)
    llm._engine._in_flight.clear()
    gc.collect()
    assert sum(array.nbytes for array in jax.live_arrays()) <= before, "what is left of the old one goes before the new one is made"


def test_results_that_cannot_be_read_make_the_cache_anew(llm, monkeypatch):
    expected = tokens_of(llm.generate(PROMPTS, PARAMS))
    cache = llm._engine.runner.executor.cache
    fail_at(monkeypatch, jax, "device_get", 2, RuntimeError("INTERNAL: the device is gone"))
    fail_at(monkeypatch, jax, "block_until_ready", 1, RuntimeError("INTERNAL: the device is gone"))  # so JAX tells of what such a program wrote
    with pytest.raises(RuntimeError, match="the device is gone"):
        llm.generate(PROMPTS, PARAMS)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
    check_whole(llm, expected)


def test_without_room_for_a_new_cache_calls_are_refused_until_there_is_some(llm, monkeypatch):
    expected = tokens_of(llm.generate(PROMPTS, PARAMS))
    runner = llm._engine.runner
    runner.executor.state.token.delete()
    monkeypatch.setattr("tpllm.engine.executor.init_cache", lambda *_: (_ for _ in ()).throw(MemoryError("all is taken")))
    with pytest.raises(RuntimeError, match="deleted"):
        llm.generate(PROMPTS, PARAMS)
    for ask in (llm.metrics, llm.reset_prefix_cache, lambda: llm.generate(PROMPTS, PARAMS), lambda: list(llm.stream(PROMPTS[0], GREEDY))):
        with pytest.raises(RuntimeError, match=r"no room for a new KV cache \(all is taken\); free some memory"):
            ask()
    monkeypatch.undo()
    check_whole(llm, expected)


def test_text_that_cannot_be_made_ends_its_row_alone(text_llm, monkeypatch):
    prompts = [{"prompt_token_ids": [5, 6, 7 + index]} for index in range(3)]
    expected = tokens_of(text_llm.generate(prompts, GREEDY))
    for name, number in (("push", 4), ("finish", 2)):
        fail_at(monkeypatch, Detokenizer, name, number, RuntimeError("no text"))
        outputs = text_llm.generate(prompts, GREEDY)
        monkeypatch.undo()
        failed = [index for index, output in enumerate(outputs) if output.outputs[0].finish_reason == "error"]
        assert len(failed) == 1
        assert "no text" in outputs[failed[0]].outputs[0].error
        assert all(tokens == expected[index] for index, tokens in enumerate(tokens_of(outputs)) if index not in failed)
    fail_at(monkeypatch, Detokenizer, "finish", 1, RuntimeError("no text"))
    iterator = text_llm.stream(prompts[0], GREEDY)
    next(iterator)
    iterator.close()
    assert not text_llm._engine.has_work
    monkeypatch.undo()
    assert tokens_of(text_llm.generate(prompts, GREEDY)) == expected


def test_scores_of_a_prompt_that_cannot_be_named_end_its_row_alone(text_llm, monkeypatch):
    prompts, scored = [{"prompt_token_ids": [5, 6, 7 + index]} for index in range(3)], dataclasses.replace(GREEDY, prompt_logprobs=1)
    fail_at(monkeypatch, type(text_llm.get_tokenizer()), "token_text", 1, RuntimeError("no name"))
    outputs = text_llm.generate(prompts, [scored, GREEDY, GREEDY])
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length", "length"]
    assert "no name" in outputs[0].outputs[0].error


def test_a_question_that_fails_leaves_what_runs_alone(llm, monkeypatch):
    expected = tokens_of(llm.generate(PROMPTS, PARAMS))
    monkeypatch.setattr("tpllm.engine.metrics.Metrics.snapshot", lambda *_, **_known: 1 / 0)
    iterator, found = llm.generate_iter(PROMPTS, PARAMS), {}
    for output in iterator:
        found[int(output.request_id)] = output
        with pytest.raises(ZeroDivisionError):
            llm.metrics()
    assert tokens_of([found[index] for index in range(3)]) == expected
