"""Sampling parameters that depend on the model: bad words as token sequences, ids within the vocabulary."""
from collections.abc import Sequence

from tpllm.engine.sampling_params import SamplingParams
from tpllm.errors import SamplingError
from tpllm.model.logit_adjustments import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS
from tpllm.tokenizer import Tokenizer


def find_bad_words(words: Sequence[str], tokenizer: Tokenizer | None) -> list[list[int]]:
    """The token sequences of some words, each at the beginning of a text and, where that differs, after a space.

    Raises:
        SamplingError: words without a tokenizer, too many sequences, or too long ones.
    """
    if words and tokenizer is None:
        raise SamplingError(f"bad_words is {words!r}, but this model has no tokenizer to find their tokens; use logit_bias")
    found: list[list[int]] = []
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) > MAX_BAD_WORD_TOKENS:
                raise SamplingError(f"the bad word {word!r} has {len(ids)} tokens; the most is {MAX_BAD_WORD_TOKENS}")
            if ids not in found:
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
