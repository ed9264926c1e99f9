"""The checks of a request before it is queued."""
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tpllm.engine.request import Prepared
from tpllm.engine.sampling_params import SamplingParams
from tpllm.errors import PromptError, SamplingError
from tpllm.model.config import ModelConfig
from tpllm.model.logit_adjustments import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS
from tpllm.tokenizer import Tokenizer

MAX_PRIORITY = 2**31


class Admission:
    """The checks of an engine.

    Args:
        config: the model.
        max_model_len: tokens a row may have.
        max_logprobs: most log probabilities of a token that are reported.
        num_cache_tokens: tokens that the KV cache has room for, of one data group.
        tokenizer: None where there is none.
    """

    def __init__(self, config: ModelConfig, *, max_model_len: int, max_logprobs: int, num_cache_tokens: int, tokenizer: Tokenizer | None):
        self._config, self._max_model_len, self._num_cache_tokens, self._tokenizer = config, max_model_len, num_cache_tokens, tokenizer
        self._max_logprobs = max_logprobs

    @property
    def max_len(self) -> int:
        """Tokens that a row can reach, prompt and completion together."""
        return min(self._max_model_len, self._num_cache_tokens)

    def prepare(self, encoded: Mapping[str, Any], params: SamplingParams, priority: int = 0) -> Prepared:
        """Check a request whose prompt is ``encoded``, as :func:`.encode_prompt` gives it, and copy its parameters: the caller may change theirs.

        Raises:
            PromptError: an empty prompt, one that leaves no room in the context or the cache, or an id outside the vocabulary.
            SamplingError: no :class:`SamplingParams`, ids that the model does not have, stop strings or bad words without a tokenizer, or a
                priority that is no number.
        """
        if not isinstance(params, SamplingParams):
            raise SamplingError(f"the sampling parameters are {params!r}; give SamplingParams(...)")
        if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > MAX_PRIORITY:
            raise SamplingError(f"the priority is {priority!r}; it must be a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}, lower ones first")
        params = self._own(params)
        token_ids = encoded["prompt_token_ids"]
        if params.truncate_prompt_tokens is not None:
            room = params.truncate_prompt_tokens
            token_ids = token_ids[-(max(self.max_len - (params.max_tokens or 1), 1) if room == -1 else room):]
        self.check_prompt(token_ids)
        if params.stop and self._tokenizer is None:
            raise SamplingError(f"stop is {params.stop!r}, but this model has no tokenizer to make text; use stop_token_ids")
        _check_vocabulary(params, self._config.vocab_size)
        bad_words = find_bad_words(params.bad_words, self._tokenizer, vocab_size=self._config.vocab_size)
        return Prepared(encoded.get("prompt"), token_ids, params, priority, bad_words)

    def _own(self, params: SamplingParams) -> SamplingParams:
        """A copy of parameters, checked again, with numbers for -1."""
        vocab_size = self._config.vocab_size
        params = dataclasses.replace(params)
        params.check_logprobs(-1 if self._max_logprobs >= vocab_size else self._max_logprobs)
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(params, name)) is not None:
                setattr(params, name, vocab_size if count == -1 else min(count, vocab_size))
        return params

    def check_prompt(self, token_ids: list[int]) -> None:
        """Raise ``PromptError`` for an empty prompt, one that leaves no room in the context or the cache, or an id outside the vocabulary."""
        limit, context, vocab_size = self._max_model_len, self._config.max_position, self._config.vocab_size
        if not token_ids:
            raise PromptError("the prompt is empty; give at least one token")
        if len(token_ids) >= limit:
            longer = f", or raise max_model_len (the model's own context is {context})" if limit < context else ""
            raise PromptError(f"the prompt has {len(token_ids)} tokens, but the context holds {limit} and at least one must be generated; "
                              f"shorten it to {limit - 1}, or set truncate_prompt_tokens{longer}")
        if len(token_ids) >= self._num_cache_tokens:
            raise PromptError(f"the prompt has {len(token_ids)} tokens, but the whole KV cache holds {self._num_cache_tokens} and at least one "
                              f"must be generated; shorten it to {self._num_cache_tokens - 1}, or raise kv_cache_tokens or memory_share")
        for token in token_ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise PromptError(f"the prompt holds token id {token!r}; ids are whole numbers from 0 to {vocab_size - 1}")


def find_bad_words(words: Sequence[str], tokenizer: Tokenizer | None, *, vocab_size: int) -> list[list[int]]:
    """The token sequences of some words, each at the beginning of a text and, where that differs, after a space.

    Special-token text is a special token, as in vLLM. A sequence with an id from ``vocab_size`` on is left out: the model cannot write it.

    Raises:
        SamplingError: words without a tokenizer, that the tokenizer cannot encode or that have no tokens; too many sequences, or too long ones.
    """
    if words and tokenizer is None:
        raise SamplingError(f"bad_words is {words!r}, but this model has no tokenizer to find their tokens; use logit_bias")
    found: list[list[int]] = []
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            try:
                ids = tokenizer.encode(text, add_special_tokens=False, parse_special=True)
            except PromptError as error:
                raise SamplingError(f"the bad word {word!r} cannot be encoded: {error}") from error
            if not ids:
                raise SamplingError(f"the bad word {word!r} has no tokens; leave it out")
            if len(ids) > MAX_BAD_WORD_TOKENS:
                raise SamplingError(f"the bad word {word!r} has {len(ids)} tokens; the most is {MAX_BAD_WORD_TOKENS}")
            if ids not in found and max(ids) < vocab_size:
                found.append(ids)
    if len(found) > MAX_BAD_WORDS:
        raise SamplingError(f"bad_words makes {len(found)} token sequences; the most is {MAX_BAD_WORDS}")
    return found


def _check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Raise ``SamplingError`` for a biased or allowed id that the model does not have."""
    for name, ids in (("logit_bias", params.logit_bias), ("allowed_token_ids", params.allowed_token_ids or ())):
        for token in ids:
            if token >= vocab_size:
                raise SamplingError(f"{name} names token id {token}; this model's ids go from 0 to {vocab_size - 1}")
