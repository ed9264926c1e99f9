"""After a step that failed, wherever and by whatever, the next call is right: no wrong token, no page lost, no array dead."""
import contextlib
import dataclasses

import jax
import pytest

from tests.engine.conftest import make_llm, make_packed_llm
from tests.engine.faults import Faults, choose_places
from tpllm import SamplingParams, ops

GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
PROMPTS = [{"prompt_token_ids": [*range(40), 1]}, {"prompt_token_ids": [*range(40), 2]}, {"prompt_token_ids": [7, 8, 9]}]
PARAMS = [GREEDY, dataclasses.replace(GREEDY, n=2, temperature=1.0, seed=1), dataclasses.replace(GREEDY, prompt_logprobs=2)]
TIGHT = {"page_size": 16, "kv_cache_tokens": 128}  # rows lose their pages


def tokens_of(outputs) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def check_whole(llm, expected) -> None:
    """The engine is idle, gives the right tokens, and holds no page and no dead array."""
    assert not llm._engine.has_work
    assert tokens_of(llm.generate(PROMPTS, PARAMS)) == expected
    assert llm.metrics().num_pages_used == 0
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((llm._engine.runner.cache, llm._engine.runner.state)))


@pytest.fixture(params=["native", "xla"])
def tight_llm(request, monkeypatch):
    """An engine whose rows lose their pages, and are computed again or swapped."""
    if request.param == "native" and not ops.uses_native(None):
        pytest.skip("the native library is not built here")
    if request.param == "xla":
        monkeypatch.setattr(ops, "uses_native", lambda _: False)
    return (make_packed_llm if request.param == "native" else make_llm)(**TIGHT)


@pytest.mark.parametrize("count", [1, pytest.param(None, marks=pytest.mark.slow)])
def test_wherever_a_step_fails_the_next_call_gives_the_right_tokens(tight_llm, monkeypatch, count):
    llm = tight_llm
    monkeypatch.setattr(llm._engine._pace, "steps_at_once", lambda is_watched: 8)  # not by the clock, so that each run is like the one before
    expected = tokens_of(llm.generate(PROMPTS, PARAMS))
    llm.reset_prefix_cache()
    faults = Faults(monkeypatch, llm._engine)
    llm.generate(PROMPTS, PARAMS)
    assert llm._engine.scheduler.num_preemptions > 0
    names, found = faults.names, set()
    for place, error in choose_places(names, count):
        llm.reset_prefix_cache()
        faults.arm(place, error)
        with contextlib.suppress(error):  # one that is a row's own ends that row, and the call goes on
            llm.generate(PROMPTS, PARAMS)
        found.add(faults.raised)
        faults.disarm()
        check_whole(llm, expected)
    assert found == set(names)
    assert {"plan", "dispatch", "step", "decode", "device_get", "push"} <= found
