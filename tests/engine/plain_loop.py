"""Decoding in the plainest way: a whole forward pass for each token, then the numpy sampler."""
import functools
from collections.abc import Sequence

import jax
import numpy as np

from tests.support import numpy_sampler
from tpllm import LLM, SamplingParams, forward
from tpllm.model.sampling import gumbel_noise

_forward = jax.jit(forward, static_argnums=4)


def last_logits(llm: LLM, row: Sequence[int]) -> np.ndarray:
    """[V] float32 logits of the token after ``row``."""
    return all_logits(llm, row)[-1]


def all_logits(llm: LLM, row: Sequence[int]) -> np.ndarray:
    """[T, V] float32 logits of the token after each one of ``row``, by one forward pass without a cache."""
    length = llm.shapes.max_model_len
    positions = np.where(np.arange(length) < len(row), np.arange(length), -1).astype(np.int32)[None]
    padded = np.array([[*row, *[0] * (length - len(row))]], np.int32)
    return np.asarray(_forward(llm.params, padded, positions, None, llm.config)[0])[0, :len(row), :llm.config.vocab_size]


def plain_tokens(llm: LLM, prompt: Sequence[int], params: SamplingParams, *, index: int = 0, eos_ids: Sequence[int] = (),
                 bad_words: Sequence[Sequence[int]] = ()) -> list[int]:
    """The token ids of completion ``index``; ``params`` brings ``max_tokens`` and, for random draws, ``seed``. Texts do not count.

    Args:
        llm: whose weights and context are used, and nothing else.
        prompt: token ids.
        params: how to sample.
        index: which of ``n``.
        eos_ids: of the model.
        bad_words: token sequences.
    """
    stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)}
    completion: list[int] = []
    draw = functools.partial(_draw, params=params, index=index)
    while len(completion) < params.max_tokens and not (completion and completion[-1] in stop_ids):
        row = [*prompt, *completion]
        adjusted_V = numpy_sampler.adjusted_logits(last_logits(llm, row), params, prompt=prompt, completion=completion, eos_ids=eos_ids,
                                                   bad_words=bad_words)
        completion.append(draw(numpy_sampler.probabilities(adjusted_V, params), position=len(row)))
    return completion


def _draw(probs_V: np.ndarray, *, params: SamplingParams, index: int, position: int) -> int:
    if params.temperature == 0:
        return int(probs_V.argmax())
    seed_12 = np.array([[params.seed >> 32, params.seed & 0xFFFFFFFF]], np.uint32)
    noise_1V = gumbel_noise(seed_12, np.array([index], np.uint32), np.array([position], np.int32), len(probs_V))
    return numpy_sampler.draw(probs_V, np.asarray(noise_1V)[0])
