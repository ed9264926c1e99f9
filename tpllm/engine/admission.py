"""What is asked of a request before it is queued."""
from collections.abc import Mapping
from typing import Any

from tpllm.engine.bad_words import check_vocabulary, find_bad_words
from tpllm.engine.request import Prepared
from tpllm.engine.sampling_params import SamplingParams
from tpllm.errors import PromptError, SamplingError
from tpllm.model.config import ModelConfig
from tpllm.tokenizer import Tokenizer

MAX_PRIORITY = 2**31


class Admission:
    """The checks of an engine.

    Args:
        config: the model.
        max_model_len: tokens a row may have.
        num_cache_tokens: tokens that the KV cache has room for, of one data group.
        tokenizer: None where there is none.
    """

    def __init__(self, config: ModelConfig, *, max_model_len: int, num_cache_tokens: int, tokenizer: Tokenizer | None):
        self._config, self._max_model_len, self._num_cache_tokens, self._tokenizer = config, max_model_len, num_cache_tokens, tokenizer

    @property
    def max_len(self) -> int:
        """Tokens that a row can reach, prompt and completion together."""
        return min(self._max_model_len, self._num_cache_tokens)

    def prepare(self, encoded: Mapping[str, Any], params: SamplingParams, priority: int = 0) -> Prepared:
        """Check a request whose prompt is ``encoded``, as :func:`.encode_prompt` gives it.

        Raises:
            PromptError: an empty prompt, one that leaves no room in the context or the cache, or an id outside the vocabulary.
            SamplingError: no :class:`SamplingParams`, ids that the model does not have, stop strings or bad words without a tokenizer, or a
                priority that is no number.
        """
        if not isinstance(params, SamplingParams):
            raise SamplingError(f"the sampling parameters are {params!r}; give SamplingParams(...)")
        if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > MAX_PRIORITY:
            raise SamplingError(f"the priority is {priority!r}; it must be a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}, lower ones first")
        token_ids = encoded["prompt_token_ids"]
        self.check_prompt(token_ids)
        if params.stop and self._tokenizer is None:
            raise SamplingError(f"stop is {params.stop!r}, but this model has no tokenizer to make text; use stop_token_ids")
        check_vocabulary(params, self._config.vocab_size)
        bad_words = find_bad_words(params.bad_words, self._tokenizer, vocab_size=self._config.vocab_size)
        return Prepared(encoded.get("prompt"), token_ids, params, priority, bad_words)

    def check_prompt(self, token_ids: list[int]) -> None:
        """Raise ``PromptError`` for an empty prompt, one that leaves no room in the context or the cache, or an id outside the vocabulary."""
        limit, context, vocab_size = self._max_model_len, self._config.max_position, self._config.vocab_size
        if not token_ids:
            raise PromptError("the prompt is empty; give at least one token")
        if len(token_ids) >= limit:
            longer = f", or raise max_model_len (the model's own context is {context})" if limit < context else ""
            raise PromptError(f"the prompt has {len(token_ids)} tokens, but the context holds {limit} and at least one must be generated; "
                              f"shorten it to {limit - 1}{longer}")
        if len(token_ids) >= self._num_cache_tokens:
            raise PromptError(f"the prompt has {len(token_ids)} tokens, but the whole KV cache holds {self._num_cache_tokens} and at least one "
                              f"must be generated; shorten it to {self._num_cache_tokens - 1}, or raise kv_cache_tokens or memory_share")
        for token in token_ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise PromptError(f"the prompt holds token id {token!r}; ids are whole numbers from 0 to {vocab_size - 1}")
