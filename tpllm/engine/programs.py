"""The engine's two device programs, as pure functions: one chunk of a prefill, and K decode steps in a loop.

Rows live in slots. The state of every slot stays on the device between programs, so the next one is dispatched before the last one's tokens
are read.
"""
import functools

import jax
import jax.numpy as jnp
from flax import struct

from sharding_rules import Partition
from sharding_rules.axes import BATCH, VOCAB
from tpllm.model.config import ModelConfig
from tpllm.model.decoder import forward, unembed
from tpllm.model.kv_cache import KVCache
from tpllm.model.logit_adjustments import Adjustments, History, empty_history, no_adjustments, remember
from tpllm.model.params import DecoderParams
from tpllm.model.sampling import MAX_TOP_LOGPROBS, Sampled, SamplingRows, TokenScores, sample, score

RUNNING, STOPPED, FULL, NOT_FINITE, NO_CHOICE = range(5)
NO_TOKEN = -1


@struct.dataclass
class SlotState:
    """What the device knows of B slots.

    Attributes:
        token: int32 [B], the last token, not yet in the cache.
        position: int32 [B], its position.
        is_alive: bool [B].
        remaining: int32 [B], tokens the row may still get.
        prompt_len: int32 [B].
        sampling: the rows' sampling parameters.
        history: what the rows have generated.
    """

    token: jax.Array
    position: jax.Array
    is_alive: jax.Array
    remaining: jax.Array
    prompt_len: jax.Array
    sampling: SamplingRows
    history: History


@struct.dataclass
class PrefillChunk:
    """One chunk of up to C prompt tokens for one row of each of the G data groups; a group with nothing to do has only padding.

    Attributes:
        tokens, positions: int32 [G, C]; positions are -1 where padded.
        targets: int32 [G, C], the prompt token after each one, for prompt log probabilities; -1 where there is none.
        row: int32 [G], the cache row within the group.
        slot: int32 [G], the slot among all; the number of slots where the group has nothing to do.
        last: int32 [G], the index in the chunk of the prompt's last token, or -1 where more chunks follow.
        remaining: int32 [G], tokens the row may get.
        prompt_len: int32 [G].
        sampling: parameters of the G rows.
        num_prompt_logprobs: int32 [G]; -1 for none.
    """

    tokens: jax.Array
    positions: jax.Array
    targets: jax.Array
    row: jax.Array
    slot: jax.Array
    last: jax.Array
    remaining: jax.Array
    prompt_len: jax.Array
    sampling: SamplingRows
    num_prompt_logprobs: jax.Array


@struct.dataclass
class StepOutput:
    """Tokens of T steps for R rows, to be read by the host.

    Attributes:
        token: int32 [T, R]; -1 where a row was not alive.
        status: int32 [T, R]: after the token the row is RUNNING, STOPPED, FULL, or NOT_FINITE or NO_CHOICE (then the token means nothing).
        scores: :class:`TokenScores` of [T, R, ...].
    """

    token: jax.Array
    status: jax.Array
    scores: TokenScores


def empty_slots(num_slots: int, num_stop_ids: int, vocab_size: int) -> SlotState:
    """The state of slots that hold nothing."""
    def zeros(*shape, dtype=jnp.int32):
        return jnp.zeros((num_slots, *shape), dtype)
    sampling = SamplingRows(
        temperature=zeros(dtype=jnp.float32), top_k=zeros(), top_p=zeros(dtype=jnp.float32) + 1, min_p=zeros(dtype=jnp.float32),
        seed=zeros(2, dtype=jnp.uint32), sample_index=zeros(dtype=jnp.uint32), stop_ids=zeros(num_stop_ids) - 1, stop_from=zeros(),
        num_logprobs=zeros() - 1, adjustments=no_adjustments(num_slots, vocab_size))
    return SlotState(token=zeros(), position=zeros(), is_alive=zeros(dtype=bool), remaining=zeros(), prompt_len=zeros() + 1, sampling=sampling,
                     history=empty_history(num_slots, vocab_size))


def slot_shardings(partition: Partition) -> SlotState:
    """Where the slots' state lies: what is as wide as the vocabulary is split like it, the rest is everywhere."""
    one, wide = partition.sharding(()), partition.sharding((None, VOCAB))
    adjustments = Adjustments(is_used=one, bias=wide, presence=one, frequency=one, repetition=one, in_prompt=wide, bad_words=one)
    sampling = SamplingRows(temperature=one, top_k=one, top_p=one, min_p=one, seed=one, sample_index=one, stop_ids=one, stop_from=one,
                            num_logprobs=one, adjustments=adjustments)
    return SlotState(token=one, position=one, is_alive=one, remaining=one, prompt_len=one, sampling=sampling,
                     history=History(counts=wide, recent=one))


def prefill(params: DecoderParams, cache: KVCache, state: SlotState, chunk: PrefillChunk, *, config: ModelConfig,
            has_prompt_logprobs: bool) -> tuple[KVCache, SlotState, StepOutput, TokenScores | None]:
    """Run one chunk; where it ends a prompt, draw the first token and put the row into its slot.

    Returns:
        The cache, the slots, the first tokens (T = 1, R = G), and, where asked for, the scores of every prompt token ([G * C, ...]).
    """
    hidden_GCD, cache = forward(params, chunk.tokens, chunk.positions, cache, config, rows_B=chunk.row, prompt_lens_B=chunk.prompt_len,
                                output="hidden")
    is_last_G = chunk.last >= 0
    last_hidden_GD = jnp.take_along_axis(hidden_GCD, jnp.maximum(chunk.last, 0)[:, None, None], axis=1)[:, 0]
    positions_G = chunk.prompt_len  # the first token comes right after the prompt
    history = empty_history(chunk.slot.shape[0], config.padded_vocab_size)
    sampled = sample(unembed(params, last_hidden_GD, config), chunk.sampling, positions_G, history, vocab_size=config.vocab_size,
                     partition=config.partition)
    remaining_G, status_G = _advance(sampled, chunk.remaining)
    slot_G = jnp.where(is_last_G, chunk.slot, state.token.shape[0])
    row_state = SlotState(token=sampled.token, position=positions_G, is_alive=status_G == RUNNING, remaining=remaining_G,
                          prompt_len=chunk.prompt_len, sampling=chunk.sampling, history=remember(history, sampled.token))
    state = jax.tree.map(lambda slots, rows: slots.at[slot_G].set(rows, mode="drop"), state, row_state)
    first = StepOutput(token=jnp.where(is_last_G, sampled.token, NO_TOKEN), status=status_G, scores=sampled.scores)
    prompt_scores = _score_prompt(params, hidden_GCD, chunk, config) if has_prompt_logprobs else None
    return cache, state, jax.tree.map(lambda leaf: leaf[None], first), prompt_scores


def decode(params: DecoderParams, cache: KVCache, state: SlotState, is_kept_B: jax.Array, num_steps: jax.Array, *, config: ModelConfig,
           max_steps: int, num_rows: int) -> tuple[KVCache, SlotState, StepOutput]:
    """Up to ``num_steps`` tokens for every live slot among the first ``num_rows``; ends early when none is alive.

    Args:
        params, cache, state, config: the model and its rows; cache and state are donated.
        is_kept_B: bool [B], False for rows the host has given up.
        num_steps: traced, at most ``max_steps``, the static size of the output.
        num_rows: how many slots, from the first on, the step computes.
    """
    state = state.replace(is_alive=state.is_alive & is_kept_B)
    rows = jax.tree.map(lambda leaf: leaf[:num_rows], state)

    def is_going_on(carry):
        step, _, rows, _ = carry
        return (step < num_steps) & jnp.any(rows.is_alive)

    def run_one(carry):
        step, cache, rows, out = carry
        cache, rows, one = _decode_one(params, cache, rows, config)
        return step + 1, cache, rows, jax.tree.map(lambda all_steps, this: all_steps.at[step].set(this), out, one)

    _, cache, rows, out = jax.lax.while_loop(is_going_on, run_one, (jnp.int32(0), cache, rows, _empty_output(max_steps, num_rows)))
    state = jax.tree.map(lambda slots, part: slots.at[:num_rows].set(part), state, rows)
    return cache, state, out


def jit_programs(config: ModelConfig, cache: KVCache, state: SlotState, *, max_steps: int) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped]:
    """(:func:`prefill`, :func:`decode`) jitted: cache and state are donated and come back where they lay.

    Args:
        config: the model, fitted to its mesh.
        cache, state: arrays, or shapes with shardings; only their shardings are read.
        max_steps: see :func:`decode`.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (cache, state))
    replicated = config.partition.sharding(())
    return (jax.jit(functools.partial(prefill, config=config), static_argnames="has_prompt_logprobs", donate_argnums=(1, 2),
                    out_shardings=(*shardings, replicated, replicated)),
            jax.jit(functools.partial(decode, config=config, max_steps=max_steps), static_argnames="num_rows", donate_argnums=(1, 2),
                    out_shardings=(*shardings, replicated)))


def _decode_one(params: DecoderParams, cache: KVCache, rows: SlotState, config: ModelConfig) -> tuple[KVCache, SlotState, StepOutput]:
    positions_B1 = jnp.where(rows.is_alive, rows.position, -1)[:, None]
    hidden_B1D, cache = forward(params, _by_rows(rows.token[:, None], config), _by_rows(positions_B1, config), cache, config,
                                prompt_lens_B=rows.prompt_len, output="hidden")
    next_position_B = rows.position + 1
    sampled = sample(unembed(params, hidden_B1D[:, 0], config), rows.sampling, next_position_B, rows.history, vocab_size=config.vocab_size,
                     partition=config.partition)
    remaining_B, status_B = _advance(sampled, rows.remaining)
    out = StepOutput(token=jnp.where(rows.is_alive, sampled.token, NO_TOKEN), status=status_B, scores=sampled.scores)
    rows = rows.replace(token=sampled.token, position=next_position_B, remaining=remaining_B, is_alive=rows.is_alive & (status_B == RUNNING),
                        history=remember(rows.history, sampled.token))
    return cache, rows, out


def _advance(sampled: Sampled, remaining_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(tokens still allowed, status) after one more token."""
    remaining_B = remaining_B - 1
    status_B = jnp.where(sampled.is_stop, STOPPED, jnp.where(remaining_B <= 0, FULL, RUNNING))
    return remaining_B, jnp.where(sampled.is_finite, jnp.where(sampled.has_choice, status_B, NO_CHOICE), NOT_FINITE)


def _score_prompt(params: DecoderParams, hidden_GCD: jax.Array, chunk: PrefillChunk, config: ModelConfig) -> TokenScores:
    num_groups, length = chunk.tokens.shape
    logits = unembed(params, hidden_GCD.reshape(num_groups * length, -1), config)
    return score(logits, jnp.maximum(chunk.targets, 0).reshape(-1), jnp.repeat(chunk.num_prompt_logprobs, length), partition=config.partition)


def _empty_output(max_steps: int, num_rows: int) -> StepOutput:
    def full(*shape, value, dtype=jnp.int32):
        return jnp.full((max_steps, num_rows, *shape), value, dtype)
    scores = TokenScores(logprob=full(value=0, dtype=jnp.float32), rank=full(value=0), top_ids=full(MAX_TOP_LOGPROBS, value=-1),
                         top_logprobs=full(MAX_TOP_LOGPROBS, value=0, dtype=jnp.float32))
    return StepOutput(token=full(value=NO_TOKEN), status=full(value=RUNNING), scores=scores)


def _by_rows(x_BT: jax.Array, config: ModelConfig) -> jax.Array:
    return x_BT if config.partition is None else config.partition.constrain(x_BT, (BATCH, None))
