"""The 5-gram that the demo model is measured against, on a toy corpus."""
import itertools

import numpy as np
import pytest

from tools.ngram_baseline import fit, window_histories

VOCAB_SIZE = 7


def toy_text(length: int, seed: int) -> np.ndarray:
    """A Markov chain of order two over six of seven tokens: the last token, often shifted by the one before it."""
    rng, tokens = np.random.default_rng(seed), [0, 1]
    for is_random in rng.random(length - 2) < 0.3:
        tokens.append(int(rng.integers(6)) if is_random else (tokens[-1] + tokens[-2] + 1) % 6)
    return np.array(tokens, np.int32)


@pytest.fixture(scope="module")
def model():
    return fit(toy_text(300, seed=0), vocab_size=VOCAB_SIZE, order=3)


def nats(model, tokens_T: np.ndarray) -> float:
    histories = window_histories(tokens_T, len(model.orders) - 1)
    return float(-np.log(model.probabilities(histories, tokens_T)).mean())


def test_the_probabilities_of_all_tokens_sum_to_one_after_any_history(model):
    for history in itertools.product(range(-1, VOCAB_SIZE), repeat=2):
        histories = np.tile(np.array(history), (VOCAB_SIZE, 1))
        p_V = model.probabilities(histories, np.arange(VOCAB_SIZE))
        assert p_V.min() > 0
        assert p_V.sum() == pytest.approx(1, abs=1e-12)


def test_it_predicts_new_text_better_than_its_unigrams_and_its_bigrams(model):
    text, new = toy_text(300, seed=0), toy_text(2000, seed=1)
    unigram, bigram = (fit(text, vocab_size=VOCAB_SIZE, order=order) for order in (1, 2))
    assert nats(model, new) < nats(bigram, new) - 0.1
    assert nats(model, new) < nats(unigram, new) - 0.3


def test_a_bigram_is_the_formula_worked_by_hand():
    # 0 1 0 1 0 2: bigrams 01 twice, 10 twice, 02 once; so 1 and 0 follow one token each, and so does 2.
    model = fit(np.array([0, 1, 0, 1, 0, 2]), vocab_size=4, order=2)
    discount = 1 / (1 + 2 * 2)
    unigram_discount = 0.5  # three unigrams of count one and none of count two
    unigram_of_2 = (1 - unigram_discount) / 3 + unigram_discount * 3 / 3 / 4
    expected = (1 - discount) / 3 + discount * 2 / 3 * unigram_of_2
    assert model.probabilities(np.array([[0]]), np.array([2])) == pytest.approx(expected)


def test_before_a_window_begins_there_is_no_history():
    assert window_histories(np.array([5, 6, 4]), 2).tolist() == [[-1, -1], [-1, 5], [5, 6]]


def test_n_grams_that_do_not_fit_64_bits_are_refused():
    with pytest.raises(ValueError, match="order is 6; with 4096 tokens it must be from 1 to 5"):
        fit(np.arange(100), vocab_size=4096, order=6)
