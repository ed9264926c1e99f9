"""Bias, bans and penalties against plain numpy."""
import jax
import numpy as np
import pytest

from tests.support.numpy_sampler import adjusted_logits
from tpllm import SamplingParams
from tpllm.model.logit_adjustments import Adjustments, History, adjust, remember
from tpllm.model.per_row import empty_rows

VOCAB, ROWS = 24, 3


def history_of(*rows: list[int]):
    """The history of rows that have generated these tokens."""
    history = empty_rows(History, len(rows), vocab=VOCAB)
    for step in range(max(map(len, rows))):
        history = remember(history, np.array([row[step] for row in rows], np.int32), np.ones(len(rows), bool))
    return history


def logits_of(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (ROWS, VOCAB)).astype(np.float32)


def test_rows_without_adjustments_keep_their_logits_to_the_bit():
    logits, history = logits_of(), history_of([1, 2], [3, 3], [4, 5])
    presence = empty_rows(Adjustments, ROWS, vocab=VOCAB).replace(presence=np.ones(ROWS, np.float32))
    out = np.asarray(jax.jit(adjust)(logits, np.array([False, True, False]), presence, history))
    np.testing.assert_array_equal(out[[0, 2]], logits[[0, 2]])
    assert (out[1] != logits[1]).sum() == 1


@pytest.mark.parametrize("penalties", [{"repetition": 1.7}, {"repetition": 0.6}, {"frequency": 0.8}, {"frequency": -1.5}, {"presence": 1.2},
                                       {"presence": -0.5}, {"repetition": 1.3, "frequency": 0.4, "presence": 0.9}], ids=str)
def test_penalties_are_those_of_the_definition(penalties):
    logits, prompts, completions = logits_of(1), [[0, 5, 5], [7], [2, 3, 20]], [[1, 1, 5, 1], [9, 8, 7, 9], [23, 3, 3, 0]]
    adjustments = empty_rows(Adjustments, ROWS, vocab=VOCAB)
    in_prompt = np.zeros((ROWS, VOCAB), bool)
    for row, prompt in enumerate(prompts):
        in_prompt[row, prompt] = True
    changed = {name: np.full(ROWS, value, np.float32) for name, value in penalties.items()}
    params = SamplingParams(**{f"{name}_penalty": value for name, value in penalties.items()})
    adjustments = adjustments.replace(in_prompt=in_prompt, **changed)
    out = adjust(logits, np.ones(ROWS, bool), adjustments, history_of(*completions))
    for row in range(ROWS):
        expected = adjusted_logits(logits[row], params, prompt=prompts[row], completion=completions[row])
        np.testing.assert_allclose(out[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("completion", "is_banned"), [([4, 5], True), ([5, 4], False), ([4, 5, 5], False), ([9, 9, 4, 5], True), ([5], False)])
def test_a_bad_word_of_several_tokens_cannot_be_completed(completion, is_banned):
    adjustments = empty_rows(Adjustments, 1, vocab=VOCAB)
    adjustments = adjustments.replace(bad_words=adjustments.bad_words.at[0, 3, -3:].set(np.array([4, 5, 6])))
    logits = logits_of()[:1]
    out = np.asarray(adjust(logits, np.ones(1, bool), adjustments, history_of(completion)))[0]
    assert np.isneginf(out[6]) == is_banned
    np.testing.assert_array_equal(np.delete(out, 6), np.delete(logits[0], 6))


@pytest.mark.parametrize("repetition", [1e-30, 1e30])
def test_a_penalty_that_overflows_makes_neither_nan_nor_a_ban_and_lifts_none(repetition):
    logits, in_prompt = np.array([[3e38, -3e38, 0.0, -np.inf, 1.0]], np.float32), np.array([[True, True, True, True, False]])
    adjustments = empty_rows(Adjustments, 1, vocab=5).replace(in_prompt=in_prompt, repetition=np.full(1, repetition, np.float32))
    out = np.asarray(adjust(logits, np.ones(1, bool), adjustments, empty_rows(History, 1, vocab=5)))[0]
    assert np.isfinite(out).tolist() == [True, True, True, False, True]
    assert out[3] == -np.inf


def test_a_token_counts_for_the_rows_that_drew_it_alone():
    before = history_of([1, 2], [3, 3])
    after = remember(before, np.array([5, 6], np.int32), np.array([True, False]))
    assert after.counts[0].tolist() == [0, 1, 1, 0, 0, 1, *[0] * (VOCAB - 6)]
    assert after.recent[0, -3:].tolist() == [1, 2, 5]
    np.testing.assert_array_equal(after.counts[1], before.counts[1])
    np.testing.assert_array_equal(after.recent[1], before.recent[1])
