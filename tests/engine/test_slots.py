"""State that the device keeps of each slot, and of a row's context beside its pages."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.conftest import lowered_decode, make_llm, random_prompts
from tpllm import SamplingParams
from tpllm.engine import programs
from tpllm.engine.slots import Cache, SlotState, pack_slot
from tpllm.model.kv_cache import KVCache
from tpllm.model.per_row import Row, empty_rows
from tpllm.model.sampling import STOP_IDS

SIZES = {"vocab": 10, STOP_IDS: 4}
PLAIN = Row(SamplingParams(temperature=0.5, stop_token_ids=[7]), prompt=[3, 1], completion=[9], seed=2**40 + 5, sample_index=2, max_new_tokens=6,
            eos_ids=frozenset({4}))
ADJUSTED = Row(SamplingParams(temperature=0, presence_penalty=1.5, logit_bias={2: -3.0}, allowed_token_ids=[2, 5], min_tokens=1), prompt=[3, 1, 3],
               completion=[5, 5], max_new_tokens=4, bad_words=[[8], [5, 2]])


def started(state, slot, row):
    """The slots with a row in one."""
    return programs.start({}, state, np.int32(slot), pack_slot(row, **SIZES))[1]


def test_what_a_slot_holds_is_what_its_row_says_and_the_others_stay_empty():
    empty = empty_rows(SlotState, 3, **SIZES)
    state = started(started(empty, 0, PLAIN), 2, ADJUSTED)
    sampling, adjustments = state.sampling, state.sampling.adjustments
    assert (state.token.tolist(), state.position.tolist(), state.remaining.tolist()) == ([9, 0, 5], [2, 0, 4], [5, 0, 2])
    assert (sampling.seed[0].tolist(), sampling.sample_index.tolist()) == ([2**8, 5], [2, 0, 0])
    assert sampling.stop_ids.tolist() == [[4, 7, -1, -1], [-1] * 4, [-1] * 4]
    assert (sampling.stop_from.tolist(), sampling.is_adjusted.tolist()) == ([2, 0, 4], [False, False, True])
    assert adjustments.presence.tolist() == [0, 0, 1.5]
    assert adjustments.bias[2].tolist() == [-np.inf, -np.inf, -3, -np.inf, -np.inf, 0, -np.inf, -np.inf, -np.inf, -np.inf]
    assert adjustments.in_prompt[2].tolist() == [False, True, False, True, *[False] * 6]
    assert adjustments.bad_words[2, 1].tolist() == [-1] * 6 + [5, 2]
    assert state.history.counts[2].tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0, 0]
    for leaf, blank in zip(jax.tree.leaves(state), jax.tree.leaves(empty), strict=True):
        np.testing.assert_array_equal(leaf[1], blank[1])
        assert leaf.dtype == blank.dtype


def test_a_row_that_adjusts_nothing_leaves_what_is_as_wide_as_the_vocabulary_alone():
    before = started(empty_rows(SlotState, 2, **SIZES), 0, ADJUSTED)
    after = started(before, 0, PLAIN)
    assert not after.sampling.is_adjusted[0]
    assert after.history.counts is before.history.counts
    assert after.sampling.adjustments.bias is before.sampling.adjustments.bias
    assert started(after, 0, ADJUSTED).history.counts[0].tolist() == before.history.counts[0].tolist()


def test_state_that_a_row_has_once_begins_empty_is_saved_with_its_pages_and_untouched_by_copies_of_pages():
    pages = {"target": KVCache((jnp.arange(24.0).reshape(4, 1, 2, 3),), (jnp.zeros((4, 1, 2, 3)),))}
    cache = Cache(pages, {"target": jnp.arange(6.0).reshape(3, 2)})
    saved = jax.device_get(programs.read_row(cache, np.int32(1), np.array([3, 0, -1], np.int32)))
    assert saved.per_row["target"].tolist() == [2.0, 3.0]
    per_row, _ = programs.start(cache.per_row, empty_rows(SlotState, 3, **SIZES), np.int32(1), pack_slot(PLAIN, **SIZES))
    assert per_row["target"].tolist() == [[0, 1], [0, 0], [4, 5]]
    cache = cache.replace(per_row=per_row, pages=programs.copy_page(cache.pages, np.int32(0), np.int32(3)))
    assert cache.pages["target"].keys[0][3].tolist() == cache.pages["target"].keys[0][0].tolist()
    back = programs.write_row(cache, np.int32(2), np.array([1, 2, -1], np.int32), saved)
    assert back.per_row["target"].tolist() == [[0, 1], [0, 0], [2, 3]]
    np.testing.assert_array_equal(back.pages["target"].keys[0][np.array([1, 2])], np.arange(24.0).reshape(4, 1, 2, 3)[np.array([3, 0])])


def test_a_row_that_is_paused_stays_as_it_is_and_goes_on_later_as_if_nothing_was():
    prompts, params = random_prompts(5, 8), SamplingParams(temperature=0.9, seed=3, max_tokens=40, presence_penalty=0.5)
    llm = make_llm()
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    engine = llm._engine
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), engine.prepare(prompt, params))
    while not all(row and row.completion.token_ids for row in engine.scheduler.slots[:2]):
        engine.step()
    while engine._in_flight:
        engine._commit(*engine._in_flight.popleft())
    rows, tables = engine.scheduler.slots[:2], engine.scheduler.tables
    found = [list(row.completion.token_ids) for row in rows]
    for steps in ([2, 0], [0, 3], [0, 0], [1, 1]):
        before = jax.device_get(engine.runner.executor.state)
        output, _ = engine.runner.executor.decode(np.array([*steps, 0, 0], np.int32), tables, num_rows=4)
        after = jax.device_get(engine.runner.executor.state)
        assert output.num_steps == max(steps)
        for slot, count in enumerate(steps):
            drawn = [token for token in np.asarray(output.token)[:, slot].tolist() if token != programs.NO_TOKEN]
            assert len(drawn) == count
            found[slot] += drawn
            if not count:
                assert all((old[slot] == new[slot]).all() for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    assert [tokens[:len(part)] for tokens, part in zip(expected, found, strict=True)] == found
    assert min(map(len, found)) >= 4
    engine.abort(*(row.request for row in rows))


@pytest.mark.parametrize("tp", [1, 4])
def test_a_token_touches_no_history_as_wide_as_the_vocabulary(tp):
    llm = make_llm({"tp": tp})
    text = lowered_decode(llm).compile().as_text()
    wide = rf"s32\[{llm.shapes.max_num_seqs},{llm.config.padded_vocab_size // tp}\]"
    made = re.findall(rf"= {wide}\S* ([a-z\-]+)\(", text)
    assert {"scatter", "dynamic-update-slice"} & set(made), "one count a row"
    assert {"add", "copy"}.isdisjoint(made)
