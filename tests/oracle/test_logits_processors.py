"""Sampling against transformers' own logits processors, in the order that tpllm documents."""
import jax
import numpy as np
import pytest

from tests.engine.test_sampling_oracle import EOS_IDS, VOCAB, Row, drawn, packed, random_rows
from tpllm.model.logit_adjustments import adjust

torch = pytest.importorskip("torch", reason="the oracle extra brings torch")
processors = pytest.importorskip("transformers", reason="the oracle extra brings transformers")
pytestmark = pytest.mark.oracle


def adjusted_by_transformers(row: Row) -> np.ndarray:
    """float64 logits after bias, bans and the repetition penalty. transformers has no presence or frequency penalty, so rows come without."""
    params, prompt_len = row.params, len(row.prompt)
    chain = []
    if params.allowed_token_ids is not None:
        chain.append(processors.SuppressTokensLogitsProcessor(sorted(set(range(VOCAB)) - set(params.allowed_token_ids))))
    if params.logit_bias:
        chain.append(processors.SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias.items()}))
    if row.bad_words:
        chain.append(processors.NoBadWordsLogitsProcessor(row.bad_words))
    stop_ids = [token for token in {*params.stop_token_ids, *(() if params.ignore_eos else EOS_IDS)} if token < VOCAB]
    if params.min_tokens and stop_ids:
        chain.append(processors.MinNewTokensLengthLogitsProcessor(prompt_len, params.min_tokens, stop_ids))
    if params.repetition_penalty != 1:
        chain.append(processors.RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    scores = torch.tensor(row.logits_V[None], dtype=torch.float64)
    return processors.LogitsProcessorList(chain)(torch.tensor([row.prompt + row.completion]), scores)[0].numpy()


def kept_by_transformers(row: Row) -> np.ndarray:
    """Probabilities after transformers' warpers too."""
    params = row.params
    chain = [processors.TemperatureLogitsWarper(float(params.temperature))]
    if params.min_p:
        chain.append(processors.MinPLogitsWarper(params.min_p))
    if params.top_k > 0:
        chain.append(processors.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(processors.TopPLogitsWarper(params.top_p))
    scores = torch.tensor(adjusted_by_transformers(row)[None])
    return torch.softmax(processors.LogitsProcessorList(chain)(None, scores), -1)[0].numpy()


def comparable_rows(seed: int) -> list[Row]:
    """Rows that both define alike: penalties of transformers only; no ties, which its top-p cuts by position; no prompt that a bad word's
    beginning reaches back into."""
    rows = []
    while len(rows) < 24:
        seed += 1000
        for row in random_rows(seed, presence_penalty=0.0, frequency_penalty=0.0):
            finite = row.adjusted()[np.isfinite(row.adjusted())]
            if len(row.completion) >= 4 and len(set(finite.tolist())) == len(finite):
                rows.append(row)
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_adjusted_logits_are_those_of_transformers(seed):
    rows = [row for row in comparable_rows(seed) if not row.params.min_tokens > len(row.completion)]
    logits, parameters, _, history = packed(rows)
    ours = np.asarray(jax.jit(adjust)(logits, parameters.is_adjusted, parameters.adjustments, history))
    np.testing.assert_allclose(ours, [adjusted_by_transformers(row) for row in rows], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_numpy_samplers_distribution_is_that_of_transformers(seed):
    rows = comparable_rows(seed)
    for row in rows:
        np.testing.assert_allclose(row.probabilities(), kept_by_transformers(row), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_likeliest_token_that_transformers_keeps_is_the_greedy_one(seed):
    rows = comparable_rows(seed)
    logits, parameters, positions, history = packed(rows)
    tokens = drawn((logits, parameters.replace(temperature=np.zeros(len(rows), np.float32)), positions, history))
    assert tokens.tolist() == [int(kept_by_transformers(row).argmax()) for row in rows]
