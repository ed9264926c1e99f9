"""Random logits, histories and parameters, packed as the engine packs them: every decision of the device is the numpy sampler's."""
import dataclasses
import functools

import jax
import numpy as np
import pytest

from sharding_rules import ONE_DEVICE, TENSOR, Partition, make_mesh
from tests.support import numpy_sampler
from tpllm import SamplingParams
from tpllm.engine.batch import row_of
from tpllm.engine.request import Prepared, new_request
from tpllm.engine.slots import SlotState
from tpllm.model import sampling
from tpllm.model.logit_adjustments import History, adjust, remember
from tpllm.model.per_row import empty_rows, pack_row
from tpllm.model.sampling import STOP_IDS, Sampled, SamplingRows, gumbel_noise, sample

VOCAB, EOS_IDS, NUM_ROWS = 40, (2, 30), 20
MARGIN = 1e-4  # a threshold that float32 and float64 see on the same side


remembered, adjusted, noise_of = jax.jit(remember), jax.jit(adjust), jax.jit(gumbel_noise, static_argnums=3)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row on its way: the model's logits for its next token, its parameters and what it has seen."""

    logits_V: np.ndarray  # noqa: N815
    params: SamplingParams
    prompt: list[int]
    completion: list[int]
    bad_words: list[list[int]]

    def adjusted(self) -> np.ndarray:
        """The oracle's logits."""
        return numpy_sampler.adjusted_logits(self.logits_V, self.params, prompt=self.prompt, completion=self.completion, eos_ids=EOS_IDS,
                                             bad_words=self.bad_words)

    def probabilities(self) -> np.ndarray:
        """The oracle's distribution."""
        return numpy_sampler.probabilities(self.adjusted(), self.params)


def random_row(rng: np.random.Generator, **chosen) -> Row:
    """A row in which each parameter is at work about every other time; ``chosen`` ones are as they are given."""
    def maybe(value, default):
        return value if rng.random() < 0.5 else default
    logits_V = rng.normal(0, 3, VOCAB)
    logits_V = (maybe(np.round(2 * logits_V) / 2, logits_V)).astype(np.float32)  # halves are full of ties
    prompt, completion = rng.integers(0, VOCAB, rng.integers(1, 20)).tolist(), rng.integers(0, VOCAB, rng.integers(0, 12)).tolist()
    bad_words = [maybe(completion[-length:], []) + rng.integers(0, VOCAB, 1 + length % 2).tolist() for length in range(1, 5)]
    values = {
        "temperature": rng.uniform(0.5, 3), "min_p": maybe(rng.uniform(0.001, 0.1), 0.0), "top_k": maybe(int(rng.integers(1, 15)), 0),
        "top_p": maybe(rng.uniform(0.3, 0.99), 1.0), "presence_penalty": maybe(rng.uniform(-2, 2), 0.0),
        "frequency_penalty": maybe(rng.uniform(-2, 2), 0.0), "repetition_penalty": maybe(rng.uniform(0.5, 2), 1.0),
        "logit_bias": maybe({int(token): rng.uniform(-5, 5) for token in rng.integers(0, VOCAB, 6)}, {}),
        "allowed_token_ids": maybe(rng.permutation(VOCAB)[:20].tolist(), None), "stop_token_ids": rng.integers(0, VOCAB + 20, 3).tolist(),
        "min_tokens": int(rng.integers(0, 16)), "ignore_eos": bool(rng.integers(2))}
    bad_words = maybe(bad_words, [])
    params = SamplingParams(**{**values, **chosen}, bad_words=["their texts do not matter here"] if bad_words else [])
    return Row(logits_V, params, prompt, completion, bad_words)


def is_clear(row: Row) -> bool:
    """Whether no threshold and no choice of the row hangs on rounding; exact ties are fine."""
    adjusted_V, params = row.adjusted(), row.params
    scaled_V = np.sort(adjusted_V[np.isfinite(adjusted_V)])[::-1] / max(params.temperature, 0.5)
    gaps, relative = -np.diff(scaled_V), np.exp(scaled_V - scaled_V[:1])
    mass_V = numpy_sampler.mass_above(numpy_sampler.probabilities(adjusted_V, dataclasses.replace(params, top_p=1.0)))
    return (len(scaled_V) > 1 and ((gaps > MARGIN) | (gaps < 1e-12)).all()
            and (params.min_p == 0 or np.abs(relative - params.min_p).min() > MARGIN)
            and (params.top_p == 1 or np.abs(mass_V - params.top_p).min() > MARGIN))


def random_rows(seed: int, **chosen) -> list[Row]:
    """``NUM_ROWS`` clear rows, the same for the same seed."""
    rng, rows = np.random.default_rng(seed), []
    while len(rows) < NUM_ROWS:
        row = random_row(rng, **chosen)
        if is_clear(row):
            rows.append(row)
    return rows


def packed(rows: list[Row]) -> tuple[np.ndarray, SamplingRows, np.ndarray, History]:
    """(logits [B, V], sampling parameters, positions, history) as the device gets them."""
    sequences = []
    for slot, row in enumerate(rows):
        prepared = Prepared(None, row.prompt, row.params, bad_words=row.bad_words)
        request = new_request(str(slot), prepared, seed=1000 + slot, max_len=100, tokenizer=None)
        sequences.append(request.sequences[0])
        sequences[-1].slot = slot
    states = [pack_row(SlotState, row_of(sequence, frozenset(EOS_IDS)), vocab=VOCAB, **{STOP_IDS: 8}) for sequence in sequences]
    positions = np.array([len(row.prompt) + len(row.completion) for row in rows], np.int32)
    sampling, history = (join(trees) for trees in ([state.sampling for state in states], [history_of(row.completion) for row in rows]))
    return np.stack([row.logits_V for row in rows]), sampling, positions, history


def history_of(completion: list[int]) -> History:
    """The history of one row."""
    history = empty_rows(History, 1, vocab=VOCAB)
    for token in completion:
        history = remembered(history, np.array([token], np.int32), np.array([True]))
    return history


def join(trees: list):
    """Rows of several trees as one."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *trees)


def probed(rows: list[Row]) -> tuple:
    """The rows, each ``VOCAB`` times, with 0, 1, 2, ... as sample index."""
    logits, parameters, positions, history = jax.tree.map(lambda leaf: np.repeat(leaf, VOCAB, axis=0), packed(rows))
    return logits, parameters.replace(sample_index=np.tile(np.arange(VOCAB, dtype=np.uint32), len(rows))), positions, history


@functools.cache
def sampler(mesh: int, _noise) -> tuple[Partition, jax.stages.Wrapped]:
    """(partition, :func:`sample` on it) over so many devices: one program for all tests that draw with one noise."""
    partition = Partition(make_mesh({"tp": mesh}), TENSOR) if mesh > 1 else ONE_DEVICE
    return partition, jax.jit(functools.partial(sample, vocab_size=VOCAB, partition=partition))


def sampled(arguments: tuple, mesh: int = 1) -> Sampled:
    """What the device draws."""
    partition, run = sampler(mesh, sampling.gumbel_noise)
    return run(jax.device_put(arguments[0], partition.sharding((None, "vocab"))), *arguments[1:])


def drawn(arguments: tuple, mesh: int = 1) -> np.ndarray:
    """The tokens that the device draws, of rows that all have a choice."""
    found = sampled(arguments, mesh)
    assert np.asarray(found.has_choice & found.is_finite).all()
    return np.asarray(found.token)


@pytest.mark.parametrize("seed", range(4))
def test_adjusted_logits_are_the_oracles(seed):
    rows = random_rows(seed, min_tokens=0)
    logits, parameters, _, history = packed(rows)
    ours = np.asarray(adjusted(logits, parameters.is_adjusted, parameters.adjustments, history))
    for row, ours_V in zip(rows, ours, strict=True):
        np.testing.assert_allclose(ours_V, row.adjusted(), rtol=2e-6, atol=2e-6)
    assert sum(row.params.adjusts_logits for row in rows) > NUM_ROWS // 2


def noise_that_favours_one(seeds, sample_index_B, positions, vocab_size):
    return 1e6 * jax.nn.one_hot(sample_index_B, vocab_size)  # beats every token that is kept, and none that is dropped


@pytest.mark.parametrize("mesh", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_tokens_that_can_be_drawn_are_the_oracles(seed, mesh, monkeypatch):
    monkeypatch.setattr(sampling, "gumbel_noise", noise_that_favours_one)
    rows = random_rows(10 + seed)
    tokens = drawn(probed(rows), mesh)
    for row, tokens_V in zip(rows, tokens.reshape(NUM_ROWS, VOCAB), strict=True):
        assert set(np.flatnonzero(tokens_V == np.arange(VOCAB))) == set(np.flatnonzero(row.probabilities())), row.params
    for name in ("top_k", "top_p", "min_p", "temperature"):
        assert any((row.probabilities() > 0).sum() != (numpy_sampler.probabilities(row.adjusted(), dataclasses.replace(
            row.params, **{name: getattr(SamplingParams(), name)})) > 0).sum() for row in rows), f"{name} decides nothing here"


@pytest.mark.parametrize("seed", range(3))
def test_the_drawn_token_is_the_oracles_under_the_same_noise(seed):
    rows = random_rows(20 + seed)
    logits, parameters, positions, history = probed(rows)
    noise = np.asarray(noise_of(parameters.seed, parameters.sample_index, positions, VOCAB)).reshape(NUM_ROWS, VOCAB, VOCAB)
    tokens = drawn((logits, parameters, positions, history)).reshape(NUM_ROWS, VOCAB)
    expected = [[numpy_sampler.draw(row.probabilities(), noise_V) for noise_V in noises] for row, noises in zip(rows, noise, strict=True)]
    assert tokens.tolist() == expected
    assert len({tuple(row) for row in expected}) > NUM_ROWS // 2


@pytest.mark.parametrize("mesh", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_greedy_token_is_the_oracles(seed, mesh):
    rows = random_rows(30 + seed, temperature=0)
    tokens = drawn(packed(rows), mesh)
    assert tokens.tolist() == [int(row.adjusted().argmax()) for row in rows]
    assert tokens.tolist() != [int(row.logits_V.argmax()) for row in rows]


TOGETHER = {"temperature": 1.3, "min_p": 0.01, "top_k": 25, "top_p": 0.93, "presence_penalty": 0.6, "frequency_penalty": -0.3,
            "repetition_penalty": 1.2, "logit_bias": {5: 1.5, 6: -2.0}, "allowed_token_ids": range(3, 38), "min_tokens": 15, "ignore_eos": False}


@pytest.mark.parametrize("mesh", [1, 4])
def test_all_parameters_together_draw_the_oracles_distribution(mesh):
    num_draws, row = 20_000, random_rows(40, **TOGETHER)[0]
    logits, parameters, positions, history = jax.tree.map(lambda leaf: np.repeat(leaf, num_draws, axis=0), packed([row]))
    parameters = parameters.replace(sample_index=np.arange(num_draws, dtype=np.uint32))
    tokens = drawn((logits, parameters, positions, history), mesh)
    counts, expected = np.bincount(tokens, minlength=VOCAB), row.probabilities() * num_draws
    is_kept = expected > 0
    assert counts[~is_kept].sum() == 0
    assert 5 < is_kept.sum() < 25
    assert expected[is_kept].min() >= 5
    statistic, degrees = np.sum((counts - expected)[is_kept] ** 2 / expected[is_kept]), is_kept.sum() - 1
    assert statistic < degrees + 4 * np.sqrt(2 * degrees), "chi-square four standard deviations above its mean"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_every_token_banned_says_that_it_has_no_choice(temperature):
    banned = Row(np.zeros(VOCAB, np.float32), SamplingParams(temperature=temperature, allowed_token_ids=[7]), [1], [9], [[9, 7]])
    free = dataclasses.replace(banned, bad_words=[])
    found = sampled(packed([banned, free] * (NUM_ROWS // 2)))
    assert found.has_choice.tolist() == [False, True] * (NUM_ROWS // 2)
    assert (found.token[1::2] == 7).all()


@pytest.mark.parametrize(("values", "possible"), [
    ({"temperature": 1e-300}, {6}), ({"temperature": 1e300}, {1, 2, 3, 4, 5, 6}), ({"temperature": 10**400}, {1, 2, 3, 4, 5, 6}),
    ({"top_p": 1e-300}, {6}), ({"min_p": 1e-300}, {1, 2, 3, 4, 5, 6}), ({"min_p": 1.0}, {6}),
    ({"repetition_penalty": 1e-300}, {4}), ({"repetition_penalty": 1e300}, {2, 4, 5, 6}), ({"repetition_penalty": 1e300, "temperature": 1e-300}, {6}),
], ids=str)
def test_a_value_beyond_float32_acts_as_its_limit(values, possible):
    logits_V = np.zeros(VOCAB, np.float32)
    logits_V[1:7] = [-1, 0, -0.5, 0.75, 0.5, 1]
    row = Row(logits_V, SamplingParams(**values, allowed_token_ids=range(1, 7)), [1, 4, 4], [4, 3], [])
    tokens = drawn(probed([row] * NUM_ROWS))
    assert set(tokens.tolist()) == possible
