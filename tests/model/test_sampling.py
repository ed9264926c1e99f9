"""Sampling on the device against plain numpy."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sharding_rules import ONE_DEVICE, TENSOR, Partition, make_mesh
from tests.support.numpy_sampler import probabilities
from tpllm import SamplingParams
from tpllm.model.sampling import SamplingRows, gumbel_noise, sample

VOCAB = 96
NONE = SamplingRows(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=(0, 0), sample_index=0, stop_ids=(-1, -1), stop_from=0, num_logprobs=-1,
                    is_adjusted=False)
DTYPES = SamplingRows(temperature=np.float32, top_k=np.int32, top_p=np.float32, min_p=np.float32, seed=np.uint32, sample_index=np.uint32,
                      stop_ids=np.int32, stop_from=np.int32, num_logprobs=np.int32, is_adjusted=np.bool_)


def rows(*each: dict) -> SamplingRows:
    """Sampling parameters of some rows, each given by what differs from plain sampling."""
    return jax.tree.map(lambda dtype, *values: np.array(values, dtype), DTYPES, *(NONE.replace(**one) for one in each),
                        is_leaf=lambda leaf: isinstance(leaf, tuple | type))


@functools.partial(jax.jit, static_argnames=("vocab_size", "partition"))
def draw(logits_BV, sampling, positions_B, vocab_size=VOCAB, partition=ONE_DEVICE):
    return sample(logits_BV, sampling, positions_B, vocab_size=vocab_size, partition=partition)


def logits_of(batch: int, seed: int = 0, scale: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (batch, VOCAB)).astype(np.float32)


FILTERS = [
    {}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 1}, {"top_k": 7}, {"top_p": 0.5}, {"top_p": 1e-6}, {"min_p": 0.2},
    {"top_k": 9, "top_p": 0.7, "temperature": 1.5}, {"top_k": 5, "min_p": 0.3}, {"top_p": 0.9, "min_p": 0.05, "temperature": 0.8},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_drawn_distribution_is_the_filtered_softmax(filters):
    num_draws, logits_V = 8000, logits_of(1)[0]
    sampling = rows({**filters, "seed": (1, 2)})
    sampling = jax.tree.map(lambda leaf: np.repeat(leaf, num_draws, axis=0), sampling)
    drawn = draw(np.tile(logits_V, (num_draws, 1)), sampling, np.arange(num_draws, dtype=np.int32))
    counts = np.bincount(np.asarray(drawn.token), minlength=VOCAB)
    expected = probabilities(logits_V, SamplingParams(**filters)) * num_draws
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))
    is_frequent = expected >= 5
    statistic = np.sum((counts - expected)[is_frequent] ** 2 / expected[is_frequent])
    degrees = max(1, is_frequent.sum() - 1)
    assert statistic < degrees + 5 * np.sqrt(2 * degrees), "chi-square five standard deviations above its mean"


def test_greedy_takes_the_first_of_the_largest_logits():
    logits = np.zeros((2, VOCAB), np.float32)
    logits[0, [11, 40]] = 3.0
    drawn = draw(logits, rows({"temperature": 0}, {"temperature": 0}), np.zeros(2, np.int32))
    assert drawn.token.tolist() == [11, 0]


def test_a_vocabulary_split_eight_ways_draws_the_same_tokens():
    partition = Partition(make_mesh({"tp": 8}), TENSOR)
    logits = logits_of(16, seed=3)
    sampling = rows(*({**FILTERS[i % len(FILTERS)], "seed": (7, i), "num_logprobs": i % 5} for i in range(16)))
    positions = np.arange(16, dtype=np.int32)
    whole = draw(logits, sampling, positions)
    split = draw(jax.device_put(logits, NamedSharding(partition.mesh, P(None, "tp"))), sampling, positions, partition=partition)
    np.testing.assert_array_equal(whole.token, split.token)
    np.testing.assert_array_equal(whole.scores.top_ids, split.scores.top_ids)
    np.testing.assert_array_equal(whole.scores.rank, split.scores.rank)
    np.testing.assert_allclose(whole.scores.logprob, split.scores.logprob, rtol=1e-5)


def test_a_rows_token_does_not_depend_on_its_neighbours_filters():
    logits, positions = logits_of(3, seed=5), np.array([4, 9, 2], np.int32)
    plain, other = {"seed": (0, 5), "temperature": 1.2}, {"top_k": 3, "top_p": 0.4, "min_p": 0.1, "temperature": 0.3, "num_logprobs": 20}
    alone = draw(logits, rows(plain, {"temperature": 0}, {"temperature": 0}), positions)
    together = draw(logits, rows(plain, other, other), positions)
    assert alone.token[0] == together.token[0]
    assert alone.scores.logprob[0] == together.scores.logprob[0]


def test_noise_depends_on_seed_sample_index_position_and_token_but_not_on_the_vocabulary():
    seeds, index, positions = np.array([[0, 1]], np.uint32), np.array([0], np.uint32), np.array([3], np.int32)
    small, large = gumbel_noise(seeds, index, positions, 40), gumbel_noise(seeds, index, positions, 4096)
    np.testing.assert_array_equal(small, large[:, :40])
    for changed in ((seeds + np.uint32(1), index, positions), (seeds, index + np.uint32(1), positions), (seeds, index, positions + np.int32(1))):
        assert np.mean(np.asarray(gumbel_noise(*changed, 4096)) == np.asarray(large)) < 0.01
    assert np.isfinite(large).all()
    assert abs(float(large.mean()) - 0.5772) < 0.1
    assert abs(float(large.std()) - np.pi / np.sqrt(6)) < 0.1


def test_log_probabilities_are_those_of_the_unfiltered_model():
    logits = logits_of(2, seed=8)
    drawn = draw(logits, rows({"temperature": 0.7, "top_k": 2, "seed": (0, 1), "num_logprobs": 20}, {"temperature": 0, "num_logprobs": 3}),
                 np.zeros(2, np.int32))
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    order = np.argsort(-exact, axis=-1, kind="stable")
    for row in range(2):
        token = int(drawn.token[row])
        assert drawn.scores.logprob[row] == pytest.approx(exact[row, token], abs=1e-5)
        assert drawn.scores.rank[row] == 1 + int((exact[row] > exact[row, token]).sum())
        np.testing.assert_array_equal(drawn.scores.top_ids[row], order[row, :20])
        np.testing.assert_allclose(drawn.scores.top_logprobs[row], exact[row, order[row, :20]], atol=1e-5)


def test_equal_logits_are_reported_in_the_order_of_their_ids():
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [5, 50]] = 1.0
    drawn = draw(logits, rows({"temperature": 0, "num_logprobs": 4}), np.zeros(1, np.int32))
    assert drawn.scores.top_ids[0, :5].tolist() == [5, 50, 0, 1, -1]


def test_stop_ids_cannot_be_drawn_before_their_position_and_are_reported_after():
    logits = np.zeros((2, VOCAB), np.float32)
    logits[:, 9], logits[:, 4] = 5.0, 3.0
    sampling = rows(*[{"temperature": 0, "stop_ids": (9, -1), "stop_from": 10}] * 2)
    drawn = draw(logits, sampling, np.array([9, 10], np.int32))
    assert drawn.token.tolist() == [4, 9]
    assert drawn.is_stop.tolist() == [False, True]


def test_padding_of_the_vocabulary_is_never_drawn():
    logits = np.pad(logits_of(64, seed=2), ((0, 0), (0, 8)), constant_values=-np.inf)
    sampling = rows(*({"temperature": 50.0, "seed": (3, i), "top_k": 95 * (i % 2), "top_p": 0.999 if i % 3 else 1.0} for i in range(64)))
    drawn = draw(logits, sampling, np.arange(64, dtype=np.int32))
    assert drawn.is_finite.all()
    assert int(drawn.token.max()) < VOCAB


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_reported_for_their_row_alone(bad):
    logits = logits_of(3)
    logits[1, 17] = bad
    drawn = draw(logits, rows({}, {}, {"temperature": 0}), np.zeros(3, np.int32))
    assert drawn.is_finite.tolist() == [True, False, True]
    assert all(0 <= token < VOCAB for token in drawn.token.tolist())


def test_extreme_logits_and_temperatures_still_draw_a_likely_token():
    logits = np.full((3, VOCAB), -3e38, np.float32)
    logits[:, 30] = 3e38
    drawn = draw(logits, rows({"temperature": 1e-6, "top_p": 0.5}, {"temperature": 1e-3}, {"temperature": 1e4, "top_k": 1}), np.zeros(3, np.int32))
    assert drawn.token.tolist() == [30, 30, 30]


def test_a_key_of_a_large_seed_uses_both_words():
    positions = jnp.zeros(1, jnp.int32)
    low, high = (gumbel_noise(np.array([seed], np.uint32), np.zeros(1, np.uint32), positions, 64) for seed in ((0, 1), (1, 1)))
    assert np.mean(np.asarray(low) == np.asarray(high)) < 0.1
