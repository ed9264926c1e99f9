"""Sampling parameters that depend on the model: bad words as token sequences, ids within the vocabulary."""
from collections.abc import Sequence

from tpllm.engine.sampling_params import SamplingParams
from tpllm.errors import PromptError, SamplingError
from tpllm.model.logit_adjustments import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS
from tpllm.tokenizer import Tokenizer


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


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Raise ``SamplingError`` for a biased or allowed id that the model does not have."""
    for name, ids in (("logit_bias", params.logit_bias), ("allowed_token_ids", params.allowed_token_ids or ())):
        for token in ids:
            if token >= vocab_size:
                raise SamplingError(f"{name} names token id {token}; this model's ids go from 0 to {vocab_size - 1}")
