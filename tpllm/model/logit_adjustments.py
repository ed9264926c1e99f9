"""What a request adds to or takes from its logits before anything is drawn: bias, allowed tokens, bad words, penalties.

The order is vLLM's: bias and bans first, then

    repetition (Keskar et al. 2019, arXiv:1909.05858), of every token seen in prompt or completion:  l > 0 ? l / r : l * r
    frequency and presence, of every token of the completion:                                        l - f * count - p * (count > 0)

All of it is elementwise over the vocabulary, which may be split.
"""
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sharding_rules.axes import VOCAB
from tpllm.model.per_row import Row, per_row, within_float32

MAX_BAD_WORDS = 32
MAX_BAD_WORD_TOKENS = 8
NEVER = -2  # a recent token that no bad word matches; -1 is a bad word's padding, which matches every token


def _bias(row: Row, vocab_size: int) -> np.ndarray:
    allowed = row.params.allowed_token_ids
    bias_V = np.full(vocab_size, 0 if allowed is None else -np.inf, np.float32)
    if allowed is not None:
        bias_V[list(allowed)] = 0
    for token, bias in row.params.logit_bias.items():
        bias_V[token] += bias
    for word in row.bad_words:
        if len(word) == 1:
            bias_V[word[0]] = -np.inf
    return bias_V


def _is_in_prompt(row: Row, vocab_size: int) -> np.ndarray:
    is_in_V = np.zeros(vocab_size, bool)
    is_in_V[list(row.prompt)] = True
    return is_in_V


def _long_bad_words(row: Row, max_words: int, max_tokens: int) -> np.ndarray:
    words = np.full((max_words, max_tokens), -1, np.int32)
    for index, word in enumerate(row.bad_words):
        if len(word) > 1:
            words[index, -len(word):] = word
    return words


@struct.dataclass
class Adjustments:
    """The adjustments of B rows.

    Attributes:
        bias: float32 [B, V], added to the logits; -inf for tokens that may not be drawn.
        presence, frequency, repetition: float32 [B]; 0, 0 and 1 for none.
        in_prompt: bool [B, V], tokens of the prompt.
        bad_words: int32 [B, 32, 8], sequences of at least two tokens that may not be completed, padded with -1 in front.
    """

    bias: jax.Array = per_row(jnp.float32, VOCAB, pack=_bias)
    presence: jax.Array = per_row(jnp.float32, pack=lambda row: row.params.presence_penalty)
    frequency: jax.Array = per_row(jnp.float32, pack=lambda row: row.params.frequency_penalty)
    repetition: jax.Array = per_row(jnp.float32, empty=1, pack=lambda row: within_float32(row.params.repetition_penalty))
    in_prompt: jax.Array = per_row(jnp.bool_, VOCAB, pack=_is_in_prompt)
    bad_words: jax.Array = per_row(jnp.int32, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS, empty=-1, pack=_long_bad_words)


def _counts(row: Row, vocab_size: int) -> np.ndarray:
    return np.bincount(np.array(row.completion, np.int64), minlength=vocab_size)


def _recent(row: Row, count: int) -> list[int]:
    return ([NEVER] * count + list(row.completion[-count:]))[-count:]


@struct.dataclass
class History:
    """What B rows that adjust their logits have generated; that of others means nothing.

    Attributes:
        counts: int32 [B, V], how often each token.
        recent: int32 [B, 7], the latest tokens, the newest last.
    """

    counts: jax.Array = per_row(jnp.int32, VOCAB, pack=_counts)
    recent: jax.Array = per_row(jnp.int32, MAX_BAD_WORD_TOKENS - 1, empty=NEVER, pack=_recent)


def remember(history: History, token_B: jax.Array, is_kept_B: jax.Array) -> History:
    """The history after one more token of the rows that ``is_kept_B`` names. It touches one count a row, not the vocabulary."""
    rows_B = jnp.arange(token_B.shape[0])
    later_B7 = jnp.concatenate([history.recent[:, 1:], token_B[:, None]], axis=1)
    return History(counts=history.counts.at[rows_B, token_B].add(is_kept_B.astype(jnp.int32)),
                   recent=jnp.where(is_kept_B[:, None], later_B7, history.recent))


def adjust(logits_BV: jax.Array, is_adjusted_B: jax.Array, adjustments: Adjustments, history: History) -> jax.Array:
    """[B, V] logits after all adjustments of the rows that ``is_adjusted_B`` names; the others keep their logits to the bit."""
    adjusted_BV = _ban_bad_words(logits_BV + adjustments.bias, adjustments.bad_words, history.recent)
    is_seen_BV = adjustments.in_prompt | (history.counts > 0)
    repetition_B1 = adjustments.repetition[:, None]
    is_banned_BV = jnp.isneginf(adjusted_BV)
    repeated_BV = jnp.where(adjusted_BV > 0, adjusted_BV / repetition_B1, adjusted_BV * repetition_B1)
    repeated_BV = jnp.clip(repeated_BV, jnp.finfo(jnp.float32).min, jnp.finfo(jnp.float32).max)  # an overflow is neither NaN nor a ban
    adjusted_BV = jnp.where(is_seen_BV & ~is_banned_BV, repeated_BV, adjusted_BV)
    adjusted_BV -= adjustments.frequency[:, None] * history.counts.astype(jnp.float32)
    adjusted_BV -= adjustments.presence[:, None] * (history.counts > 0).astype(jnp.float32)
    return jnp.where(is_adjusted_B[:, None], adjusted_BV, logits_BV)


def _ban_bad_words(logits_BV: jax.Array, bad_words_BWL: jax.Array, recent_BL: jax.Array) -> jax.Array:
    """-inf for the last token of every bad word whose other tokens are the latest ones."""
    prefix_BWL, last_BW = bad_words_BWL[:, :, :-1], bad_words_BWL[:, :, -1]
    is_completed_BW = jnp.all((prefix_BWL == -1) | (prefix_BWL == recent_BL[:, None]), axis=-1) & (last_BW >= 0)
    ids_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)

    def ban(word, logits_BV):
        is_banned_BV = (ids_V == last_BW[:, word, None]) & is_completed_BW[:, word, None]
        return jnp.where(is_banned_BV, -jnp.inf, logits_BV)
    return jax.lax.cond(jnp.any(is_completed_BW), lambda x: jax.lax.fori_loop(0, MAX_BAD_WORDS, ban, x), lambda x: x, logits_BV)
