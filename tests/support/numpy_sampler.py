"""vLLM's sampler in plain float64 numpy, one row at a time: what tpllm's sampling on the device is compared with.

Written from the meaning of each parameter as vLLM documents it; nothing of tpllm's sampling is used.
"""
from collections.abc import Sequence

import numpy as np

from tpllm import SamplingParams


def adjusted_logits(logits_V: np.ndarray, params: SamplingParams, *, prompt: Sequence[int] = (), completion: Sequence[int] = (),
                    eos_ids: Sequence[int] = (), bad_words: Sequence[Sequence[int]] = ()) -> np.ndarray:
    """Logits after allowed tokens, bias, bad words, min_tokens and penalties, in this order; -inf is a token that may not be drawn.

    Args:
        logits_V: of one row.
        params: its parameters; of ``bad_words`` only the token sequences given here count.
        prompt, completion: token ids so far.
        eos_ids: of the model.
        bad_words: token sequences that may not be completed.
    """
    out, completion = np.array(logits_V, np.float64), list(completion)
    if params.allowed_token_ids is not None:
        out[sorted(set(range(len(out))) - set(params.allowed_token_ids))] = -np.inf
    for token, bias in params.logit_bias.items():
        out[token] += bias
    for *before, last in bad_words:
        if completion[len(completion) - len(before):] == before:
            out[last] = -np.inf
    if len(completion) < params.min_tokens:
        stop_ids = [*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)]
        out[[token for token in stop_ids if token < len(out)]] = -np.inf
    for token in set(prompt) | set(completion):
        out[token] = out[token] / params.repetition_penalty if out[token] > 0 else out[token] * params.repetition_penalty
    for token in set(completion):
        out[token] -= params.frequency_penalty * completion.count(token) + params.presence_penalty
    return out


def probabilities(adjusted_V: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The distribution that a token is drawn from: temperature, then min_p, top_k, top_p; tokens tied with the last one kept are kept.

    0 for dropped tokens; at temperature 0 all of it on the first of the best.
    """
    if params.temperature == 0:
        return np.eye(len(adjusted_V))[adjusted_V.argmax()]
    probs = np.exp((adjusted_V - adjusted_V.max()) / params.temperature)
    probs[probs < params.min_p] = 0  # the likeliest has 1
    if params.top_k > 0:
        probs[probs < np.sort(probs)[::-1][:params.top_k][-1]] = 0
    if params.top_p < 1:
        probs[mass_above(probs) >= params.top_p] = 0
    return probs / probs.sum()


def mass_above(probs_V: np.ndarray) -> np.ndarray:
    """For each token the share of probability on strictly likelier ones: top_p drops a token where it has been reached by then."""
    return np.array([probs_V[probs_V > prob].sum() for prob in probs_V]) / probs_V.sum()


def draw(probs_V: np.ndarray, noise_V: np.ndarray) -> int:
    """The token that Gumbel noise picks (Gumbel 1954)."""
    with np.errstate(divide="ignore"):
        return int((np.log(probs_V) + noise_V).argmax())
