"""Drawing tokens on the device, every parameter traced per row, over logits that stay split over the vocabulary.

Nothing here sorts, gathers or concatenates along the vocabulary: thresholds are found by counting (:func:`_threshold`), the best token by
two reductions, so that a sharded vocabulary costs a fixed number of all-reduces of one number a row.

The order of the filters is vLLM's: temperature, min_p, top_k, top_p. A token is drawn by the Gumbel-max trick (Gumbel 1954): the argmax of
logits / temperature + noise, where the noise of one token depends on (seed, sample index, position, token id) alone.
"""
import functools

import jax
import jax.numpy as jnp
from flax import struct

from sharding_rules import Partition
from sharding_rules.axes import BATCH, VOCAB
from tpllm import ops
from tpllm.model.logit_adjustments import Adjustments, History, adjust
from tpllm.model.per_row import Row, per_row, rows_of, within_float32

MAX_TOP_LOGPROBS = 20
STOP_IDS = "stop_ids"  # a dim: the most stop ids that a row may have


def _stop_ids(row: Row, most: int) -> list[int]:
    ids = sorted({*row.params.stop_token_ids, *(() if row.params.ignore_eos else row.eos_ids)})
    return ids + [-1] * (most - len(ids))


@struct.dataclass
class SamplingRows:
    """The sampling parameters of B rows; each field is an array whose first dim is B.

    Attributes:
        temperature: float32; 0 is greedy.
        top_k: int32; 0 keeps all.
        top_p, min_p: float32; 1 and 0 keep all.
        seed: uint32 [B, 2], high and low word.
        sample_index: uint32, which of a request's ``n``.
        stop_ids: int32 [B, N], padded with -1.
        stop_from: int32, the first position at which a stop id may be drawn.
        num_logprobs: int32, how many likeliest tokens to report; -1 for none.
        is_adjusted: bool, whether the row has adjustments.
        adjustments: bias, bans and penalties, or None where no row has any.
    """

    temperature: jax.Array = per_row(jnp.float32, pack=lambda row: within_float32(row.params.temperature))
    top_k: jax.Array = per_row(jnp.int32, pack=lambda row: max(row.params.top_k, 0))
    top_p: jax.Array = per_row(jnp.float32, empty=1, pack=lambda row: within_float32(row.params.top_p))
    min_p: jax.Array = per_row(jnp.float32, pack=lambda row: within_float32(row.params.min_p))
    seed: jax.Array = per_row(jnp.uint32, 2, pack=lambda row, _: (row.seed >> 32, row.seed & 0xFFFFFFFF))
    sample_index: jax.Array = per_row(jnp.uint32, pack=lambda row: row.sample_index)
    stop_ids: jax.Array = per_row(jnp.int32, STOP_IDS, empty=-1, pack=_stop_ids)
    stop_from: jax.Array = per_row(jnp.int32, pack=lambda row: len(row.prompt) + min(row.params.min_tokens, row.max_new_tokens))
    num_logprobs: jax.Array = per_row(jnp.int32, empty=-1, pack=lambda row: -1 if row.params.logprobs is None else row.params.logprobs)
    is_adjusted: jax.Array = per_row(jnp.bool_, pack=lambda row: row.params.adjusts_logits)
    adjustments: Adjustments | None = rows_of(Adjustments, default=None)

    def only(self, is_drawn_B: jax.Array) -> "SamplingRows":
        """The same, but that what is costly is asked for by the rows alone that ``is_drawn_B`` names."""
        return self.replace(temperature=jnp.where(is_drawn_B, self.temperature, 0), num_logprobs=jnp.where(is_drawn_B, self.num_logprobs, -1),
                            is_adjusted=self.is_adjusted & is_drawn_B)


@struct.dataclass
class Sampled:
    """What :func:`sample` gives, per row.

    Attributes:
        token: int32 [B].
        is_stop: bool [B], the token is one of the row's stop ids.
        is_finite: bool [B], False where the row's logits hold NaN or infinity.
        has_choice: bool [B], False where every token is banned; the token means nothing then.
        scores: log probabilities, of the model's own logits.
    """

    token: jax.Array
    is_stop: jax.Array
    is_finite: jax.Array
    has_choice: jax.Array
    scores: "TokenScores"


@struct.dataclass
class TokenScores:
    """Log probabilities of given tokens and of the likeliest ones.

    Attributes:
        logprob: float32 [B].
        rank: int32 [B], 1 for the likeliest.
        top_ids: int32 [B, 20], or as many as may be asked for: the likeliest ids, best first; only as many as some row did ask for are filled in.
        top_logprobs: float32, of the same shape.
    """

    logprob: jax.Array
    rank: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def sample(logits_BV: jax.Array, rows: SamplingRows, positions_B: jax.Array, history: History | None = None, *, vocab_size: int,
           partition: Partition, max_logprobs: int = MAX_TOP_LOGPROBS) -> Sampled:
    """Draw one token a row.

    Args:
        logits_BV: float32; ids from ``vocab_size`` on are padding, at -inf.
        rows: sampling parameters.
        positions_B: int32, the absolute position each drawn token will have.
        history: what the rows have generated; needed where ``rows`` has adjustments.
        vocab_size: tokens that may be drawn.
        partition: the model's mesh and rules.
        max_logprobs: the most log probabilities that a row may ask for.
    """
    ids_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)
    is_finite_B = ~jnp.any(~jnp.isfinite(logits_BV) & (ids_V < vocab_size), axis=-1)
    bans_stop_B = positions_B < rows.stop_from

    def only_if(is_needed, function, logits_BV, *operands):
        changed_BV = jax.lax.cond(is_needed, function, lambda logits, *_: logits, logits_BV, *operands)
        return partition.constrain(changed_BV, (BATCH, VOCAB))  # or XLA:GPU gathers what a branch gives

    adjusted_BV = logits_BV
    if rows.adjustments is not None:
        adjusted_BV = only_if(jnp.any(rows.is_adjusted), adjust, logits_BV, rows.is_adjusted, rows.adjustments, history)
    allowed_BV = only_if(jnp.any(bans_stop_B), _ban_stop_ids, adjusted_BV, rows.stop_ids, bans_stop_B)
    is_random_B = rows.temperature > 0
    noisy_BV = only_if(jnp.any(is_random_B), lambda x: _noisy(x, rows, positions_B, partition), allowed_BV)
    token_B, best_B = _argmax(jnp.where(is_random_B[:, None], noisy_BV, allowed_BV), vocab_size)
    return Sampled(token=token_B, is_stop=jnp.any(rows.stop_ids == token_B[:, None], axis=-1), is_finite=is_finite_B, has_choice=best_B > -jnp.inf,
                   scores=score(logits_BV, token_B, rows.num_logprobs, partition=partition, max_logprobs=max_logprobs))


def score(logits_BV: jax.Array, token_B: jax.Array, num_logprobs_B: jax.Array, *, partition: Partition,
          max_logprobs: int = MAX_TOP_LOGPROBS) -> TokenScores:
    """Log probabilities of ``token_B`` and of the likeliest tokens under the logits' softmax."""
    ids_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)
    largest_B = jnp.max(logits_BV, axis=-1)
    normalizer_B = largest_B + jnp.log(ops.vocab_sums(jnp.exp(logits_BV - largest_B[:, None]), partition))
    chosen_B = jnp.sum(jnp.where(ids_V == token_B[:, None], logits_BV, 0.0), axis=-1)
    rank_B = 1 + jnp.sum(logits_BV > chosen_B[:, None], axis=-1, dtype=jnp.int32)
    top_ids, top_logits = _likeliest(logits_BV, jnp.max(num_logprobs_B), max_logprobs)
    return TokenScores(logprob=chosen_B - normalizer_B, rank=rank_B, top_ids=top_ids, top_logprobs=top_logits - normalizer_B[:, None])


def _noisy(logits_BV: jax.Array, rows: SamplingRows, positions_B: jax.Array, partition: Partition) -> jax.Array:
    """Scaled, filtered and Gumbel-perturbed logits."""
    temperature_B1 = jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    largest_B1 = jnp.maximum(jnp.max(logits_BV, axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)  # a row may have every token banned
    scaled_BV = (logits_BV - largest_B1) / temperature_B1  # at most 0: a tiny temperature does not overflow
    is_filtered = jnp.any((rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0))
    num_shards = partition.size(VOCAB)
    filter_rows = functools.partial(_filter, rows=rows, bits_a_round=1 if num_shards == 1 else 4, partition=partition)
    kept_BV = jax.lax.cond(is_filtered, filter_rows, lambda x: x, scaled_BV)
    noise_BV = gumbel_noise(rows.seed, rows.sample_index, positions_B, logits_BV.shape[1])
    noise_BV = partition.constrain(noise_BV, (BATCH, VOCAB))
    return kept_BV + noise_BV


def gumbel_noise(seed_B2: jax.Array, sample_index_B: jax.Array, positions_B: jax.Array, vocab_size: int) -> jax.Array:
    """[B, V] float32 standard Gumbel noise; entry [b, v] depends on the row's key, its position and v, and not on V.

    The key is threefry2x32 (Salmon et al. 2011) of ``seed``, folded with the sample index and then with the position.
    """
    def bits(seed_2, sample_index, position):
        key = jax.random.wrap_key_data(seed_2, impl="threefry2x32")
        return jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, sample_index), position), (vocab_size,), jnp.uint32)
    with jax.threefry_partitionable(True):
        bits_BV = jax.vmap(bits)(seed_B2, sample_index_B, positions_B.astype(jnp.uint32))
    uniform_BV = jnp.minimum((bits_BV.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform_BV))


def _filter(scaled_BV: jax.Array, rows: SamplingRows, *, bits_a_round: int, partition: Partition) -> jax.Array:
    """-inf wherever min_p, top_k or top_p drops a token. The largest of ``scaled_BV`` is 0."""
    probs_BV = jnp.exp(scaled_BV)  # the likeliest token has 1
    keys_BV = _sortable(scaled_BV)
    kept_BV = probs_BV >= rows.min_p[:, None]
    options = {"bits_a_round": bits_a_round, "partition": partition}

    def keep_top_k(kept_BV):
        threshold_B = _threshold(keys_BV, jnp.ones_like(probs_BV), rows.top_k.astype(jnp.float32), **options)
        return kept_BV & ((keys_BV >= threshold_B[:, None]) | (rows.top_k <= 0)[:, None])

    def keep_top_p(kept_BV):
        mass_BV = jnp.where(kept_BV, probs_BV, 0.0)
        threshold_B = _threshold(keys_BV, mass_BV, rows.top_p * ops.vocab_sums(mass_BV, partition), **options)
        return kept_BV & ((keys_BV >= threshold_B[:, None]) | (rows.top_p >= 1)[:, None])

    kept_BV = jax.lax.cond(jnp.any(rows.top_k > 0), keep_top_k, lambda kept: kept, kept_BV)
    kept_BV = jax.lax.cond(jnp.any(rows.top_p < 1), keep_top_p, lambda kept: kept, kept_BV)
    return jnp.where(kept_BV, scaled_BV, -jnp.inf)


def _sortable(x: jax.Array) -> jax.Array:
    """float32 to uint32 in the same order; -0.0 and 0.0 are equal."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(keys_BV: jax.Array, weights_BV: jax.Array, target_B: jax.Array, *, bits_a_round: int,
               partition: Partition) -> jax.Array:
    """The largest key t of each row with sum(weights where keys >= t) >= target, or 0 where even all fall short.

    It is found from its top bits down, ``bits_a_round`` at a time: more at once means more work and fewer all-reduces.
    """
    steps_J = jnp.arange(1, 2**bits_a_round, dtype=jnp.uint32)

    def refine(round_index, threshold_B):
        shift = (32 - bits_a_round * (round_index + 1)).astype(jnp.uint32)
        candidates_BJ = threshold_B[:, None] + (steps_J << shift)
        is_above_BJV = keys_BV[:, None, :] >= candidates_BJ[:, :, None]
        sums_BJ = ops.vocab_sums(jnp.where(is_above_BJV, weights_BV[:, None, :], 0.0), partition)
        num_reached_B = jnp.sum(sums_BJ >= target_B[:, None], axis=-1, dtype=jnp.uint32)  # sums fall as candidates rise
        return threshold_B + (num_reached_B << shift)
    return jax.lax.fori_loop(0, 32 // bits_a_round, refine, jnp.zeros(keys_BV.shape[0], jnp.uint32))


def _argmax(x_BV: jax.Array, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """The first id of the largest value, and that value, by two reductions; the id is 0 where a row holds only NaN."""
    best_B1 = jnp.max(x_BV, axis=-1, keepdims=True)
    ids_V = jnp.arange(x_BV.shape[1], dtype=jnp.int32)
    first_B = jnp.min(jnp.where(x_BV == best_B1, ids_V, vocab_size), axis=-1)
    return jnp.where(first_B < vocab_size, first_B, 0), best_B1[:, 0]


def _ban_stop_ids(logits_BV: jax.Array, stop_ids_BN: jax.Array, bans_stop_B: jax.Array) -> jax.Array:
    ids_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)

    def ban(n, logits_BV):
        is_banned_BV = (ids_V == stop_ids_BN[:, n, None]) & bans_stop_B[:, None]
        return jnp.where(is_banned_BV, -jnp.inf, logits_BV)
    return jax.lax.fori_loop(0, stop_ids_BN.shape[1], ban, logits_BV)


def _likeliest(logits_BV: jax.Array, count: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Ids and logits, [B, most] each, of the ``count`` largest; equal ones in the order of their ids. The rest is -1 and -inf, or true as well where
    so many may be asked for that sorting, which gathers the vocabulary, is less work."""
    batch = logits_BV.shape[0]

    def nothing(*_):
        return jnp.full((batch, most), -1, jnp.int32), jnp.full((batch, most), -jnp.inf)
    if most > MAX_TOP_LOGPROBS:
        return jax.lax.cond(count > 0, lambda x: tuple(jax.lax.top_k(x, most)[::-1]), nothing, logits_BV)
    ids_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)

    def take(n, found):
        ids, values, last_id_B1, last_B1 = found
        is_left_BV = (logits_BV < last_B1) | ((logits_BV == last_B1) & (ids_V > last_id_B1))
        best_B1 = jnp.max(jnp.where(is_left_BV, logits_BV, -jnp.inf), axis=-1, keepdims=True)
        id_B1 = jnp.min(jnp.where(is_left_BV & (logits_BV == best_B1), ids_V, logits_BV.shape[1] - 1), axis=-1, keepdims=True)
        return ids.at[:, n].set(id_B1[:, 0]), values.at[:, n].set(best_B1[:, 0]), id_B1, best_B1

    start = (*nothing(), jnp.full((batch, 1), -1, jnp.int32), jnp.full((batch, 1), jnp.inf))
    ids, values, _, _ = jax.lax.fori_loop(0, jnp.minimum(count, most), take, start)
    return ids, values
