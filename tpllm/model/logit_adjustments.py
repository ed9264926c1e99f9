"""What a request adds to or takes from its logits before anything is drawn: bias, allowed tokens, bad words, penalties.

The order is vLLM's: bias and bans first, then

    repetition (Keskar et al. 2019, arXiv:1909.05858), of every token seen in prompt or completion:  l > 0 ? l / r : l * r
    frequency and presence, of every token of the completion:                                        l - f * count - p * (count > 0)

All of it is elementwise over the vocabulary, which may be split.
"""
import jax
import jax.numpy as jnp
from flax import struct

MAX_BAD_WORDS = 32
MAX_BAD_WORD_TOKENS = 8
NEVER = -2  # a recent token that no bad word matches; -1 is a bad word's padding, which matches every token


@struct.dataclass
class Adjustments:
    """The adjustments of B rows.

    Attributes:
        is_used: bool [B], whether the row has any.
        bias: float32 [B, V], added to the logits; -inf for tokens that may not be drawn.
        presence, frequency, repetition: float32 [B]; 0, 0 and 1 for none.
        in_prompt: bool [B, V], tokens of the prompt.
        bad_words: int32 [B, 32, 8], sequences of at least two tokens that may not be completed, padded with -1 in front.
    """

    is_used: jax.Array
    bias: jax.Array
    presence: jax.Array
    frequency: jax.Array
    repetition: jax.Array
    in_prompt: jax.Array
    bad_words: jax.Array


@struct.dataclass
class History:
    """What B rows have generated.

    Attributes:
        counts: int32 [B, V], how often each token.
        recent: int32 [B, 7], the latest tokens, the newest last.
    """

    counts: jax.Array
    recent: jax.Array


def no_adjustments(num_rows: int, vocab_size: int) -> Adjustments:
    """Rows that adjust nothing."""
    return Adjustments(
        is_used=jnp.zeros(num_rows, bool), bias=jnp.zeros((num_rows, vocab_size), jnp.float32), presence=jnp.zeros(num_rows, jnp.float32),
        frequency=jnp.zeros(num_rows, jnp.float32), repetition=jnp.ones(num_rows, jnp.float32), in_prompt=jnp.zeros((num_rows, vocab_size), bool),
        bad_words=jnp.full((num_rows, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, jnp.int32))


def empty_history(num_rows: int, vocab_size: int) -> History:
    """Rows that have generated nothing."""
    return History(counts=jnp.zeros((num_rows, vocab_size), jnp.int32), recent=jnp.full((num_rows, MAX_BAD_WORD_TOKENS - 1), NEVER, jnp.int32))


def remember(history: History, token_B: jax.Array) -> History:
    """The history after one more token a row."""
    ids_V = jnp.arange(history.counts.shape[1], dtype=jnp.int32)
    return History(counts=history.counts + (ids_V == token_B[:, None]).astype(jnp.int32),
                   recent=jnp.concatenate([history.recent[:, 1:], token_B[:, None]], axis=1))


def adjust(logits_BV: jax.Array, adjustments: Adjustments, history: History) -> jax.Array:
    """[B, V] logits after all adjustments; a row without any keeps its logits to the bit."""
    adjusted_BV = _ban_bad_words(logits_BV + adjustments.bias, adjustments.bad_words, history.recent)
    is_seen_BV = adjustments.in_prompt | (history.counts > 0)
    repetition_B1 = adjustments.repetition[:, None]
    is_banned_BV = jnp.isneginf(adjusted_BV)
    repeated_BV = jnp.where(adjusted_BV > 0, adjusted_BV / repetition_B1, adjusted_BV * repetition_B1)
    repeated_BV = jnp.clip(repeated_BV, jnp.finfo(jnp.float32).min, jnp.finfo(jnp.float32).max)  # an overflow is neither NaN nor a ban
    adjusted_BV = jnp.where(is_seen_BV & ~is_banned_BV, repeated_BV, adjusted_BV)
    adjusted_BV -= adjustments.frequency[:, None] * history.counts.astype(jnp.float32)
    adjusted_BV -= adjustments.presence[:, None] * (history.counts > 0).astype(jnp.float32)
    return jnp.where(adjustments.is_used[:, None], adjusted_BV, logits_BV)


def _ban_bad_words(logits_BV: jax.Array, bad_words_BWL: jax.Array, recent_BL: jax.Array) -> jax.Array:
    """-inf for the last token of every bad word whose other tokens are the latest ones."""
    prefix_BWL, last_BW = bad_words_BWL[:, :, :-1], bad_words_BWL[:, :, -1]
    is_completed_BW = jnp.all((prefix_BWL == -1) | (prefix_BWL == recent_BL[:, None]), axis=-1) & (last_BW >= 0)
    ids_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)

    def ban(word, logits_BV):
        is_banned_BV = (ids_V == last_BW[:, word, None]) & is_completed_BW[:, word, None]
        return jnp.where(is_banned_BV, -jnp.inf, logits_BV)
    return jax.lax.cond(jnp.any(is_completed_BW), lambda x: jax.lax.fori_loop(0, MAX_BAD_WORDS, ban, x), lambda x: x, logits_BV)
