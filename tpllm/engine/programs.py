"""The engine's device programs, as pure functions: a step over pieces of contexts, K decode steps in a loop, and what comes before them.

Rows live in slots. The state of every slot stays on the device between programs, so the next one is dispatched before the last one's tokens
are read. Keys and values lie in pages; which pages a slot's row has comes with every call.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.page_table import PageTable
from sharding_rules import Partition
from sharding_rules.axes import BATCH, VOCAB
from tpllm import ops
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
        is_alive: bool [B], whether the row decodes.
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
class Chunk:
    """Up to C tokens for the rows of each of the G data groups; what a group does not need is padding.

    Attributes:
        tokens, positions: int32 [G, C]; positions are -1 where padded.
        slot: int32 [G, C]: this is the last token of that slot's row, token and position are on the device; -1 elsewhere.
        rows: int32, the row within the group: [G, C] of each token, or [G] where a group's tokens are all of one row.
        last: int32 [B], for each slot the index in its group's chunk of the token whose successor is drawn; -1 for none.
        is_complete: bool [B], whether the chunk holds the last of a slot's context, so that it decodes from now on.
        targets, num_logprobs: int32 [G, C], the token after each one, and how many log probabilities are wanted of it; -1 for none.
    """

    tokens: jax.Array
    positions: jax.Array
    slot: jax.Array
    rows: jax.Array
    last: jax.Array
    is_complete: jax.Array
    targets: jax.Array
    num_logprobs: jax.Array


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


def step(params: DecoderParams, cache: KVCache, state: SlotState, chunk: Chunk, is_kept_B: jax.Array, pages_BL: jax.Array, *,
         config: ModelConfig, scores_prompt: bool) -> tuple[KVCache, SlotState, StepOutput, TokenScores | None]:
    """Run one chunk; draw a token for each row whose context it completes, and for each one that decodes in it.

    Args:
        params, cache, state, config: the model and its rows; cache and state are donated.
        chunk: the tokens.
        is_kept_B: bool [B], False for rows the host has given up.
        pages_BL: int32, the pages of each slot's row, counted within its data group.
        scores_prompt: whether every token of the chunk is scored.

    Returns:
        The cache, the slots, one token a slot (T = 1), and, where asked for, the scores of the chunk's tokens ([G * C, ...]).
    """
    G, B = chunk.tokens.shape[0], state.token.shape[0]
    state = state.replace(is_alive=state.is_alive & is_kept_B)
    from_slot_GC, slot_GC = chunk.slot >= 0, jnp.maximum(chunk.slot, 0)
    tokens_GC = jnp.where(from_slot_GC, state.token[slot_GC], chunk.tokens)
    positions_GC = jnp.where(from_slot_GC, jnp.where(state.is_alive, state.position, -1)[slot_GC], chunk.positions)
    first_slot = (jnp.arange(G) * (B // G)).reshape(G, *(1,) * (chunk.rows.ndim - 1))
    hidden_GCD, cache = forward(params, _by_rows(tokens_GC, config), _by_rows(positions_GC, config), cache, config,
                                table=PageTable(pages_BL, chunk.rows), prompt_lens=state.prompt_len[first_slot + chunk.rows], output="hidden")
    last_GR1 = jnp.maximum(chunk.last, 0).reshape(G, B // G, 1)
    hidden_BD = jnp.take_along_axis(hidden_GCD, last_GR1, axis=1).reshape(B, -1)
    is_drawn_B = (chunk.last >= 0) & (state.is_alive | chunk.is_complete)
    state, out = _draw(params, hidden_BD, state, is_drawn_B, config)
    scores = _score_chunk(params, hidden_GCD, chunk, config) if scores_prompt else None
    return cache, state, jax.tree.map(lambda leaf: leaf[None], out), scores


def decode(params: DecoderParams, cache: KVCache, state: SlotState, is_kept_B: jax.Array, pages_BL: jax.Array, num_steps: jax.Array, *,
           config: ModelConfig, max_steps: int, num_rows: int) -> tuple[KVCache, SlotState, StepOutput]:
    """Up to ``num_steps`` tokens for every live slot among the first ``num_rows``; ends early when none is alive.

    Args:
        params, cache, state, config: the model and its rows; cache and state are donated.
        is_kept_B, pages_BL: see :func:`step`; there are pages for all the steps.
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
        cache, rows, one = _decode_one(params, cache, rows, pages_BL[:num_rows], config)
        return step + 1, cache, rows, jax.tree.map(lambda all_steps, this: all_steps.at[step].set(this), out, one)

    _, cache, rows, out = jax.lax.while_loop(is_going_on, run_one, (jnp.int32(0), cache, rows, _empty_output(max_steps, num_rows)))
    state = jax.tree.map(lambda slots, part: slots.at[:num_rows].set(part), state, rows)
    return cache, state, out


def start(state: SlotState, slot: jax.Array, row: SlotState, *, has_adjustments: bool) -> SlotState:
    """Put one row into its slot.

    Args:
        state: donated.
        slot: int32.
        row: a state of one slot.
        has_adjustments: whether the row adjusts its logits; without them the slot's biases, bans and history stay what they are, unused.
    """
    if not has_adjustments:
        unused = state.sampling.adjustments.replace(is_used=state.sampling.adjustments.is_used.at[slot].set(False))
        kept, state, row = state.history, _without_adjustments(state), _without_adjustments(row)
        state = jax.tree.map(lambda slots, one: slots.at[slot].set(one[0]), state, row)
        return state.replace(history=kept, sampling=state.sampling.replace(adjustments=unused))
    return jax.tree.map(lambda slots, one: slots.at[slot].set(one[0]), state, row)


def copy_page(cache: KVCache, source: jax.Array, target: jax.Array) -> KVCache:
    """The cache, donated, with the content of one page in another too."""
    return jax.tree.map(lambda pages: pages.at[target].set(pages[source]), cache)


def read_pages(cache: KVCache, pages_L: jax.Array) -> KVCache:
    """A row's pages, in order: arrays of [L, ...]; what is read for a negative page means nothing."""
    return jax.tree.map(lambda pages: pages[jnp.maximum(pages_L, 0)], cache)


def write_pages(cache: KVCache, pages_L: jax.Array, saved: KVCache) -> KVCache:
    """The cache, donated, with what :func:`read_pages` gave in other pages; negative ones are not written."""
    at_L = jnp.where(pages_L < 0, cache.num_pages, pages_L)
    return jax.tree.map(lambda pages, old: pages.at[at_L].set(old, mode="drop"), cache, saved)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The functions of this module, jitted: cache and state are donated and come back where they lay."""

    step: jax.stages.Wrapped
    decode: jax.stages.Wrapped
    start: jax.stages.Wrapped
    copy_page: jax.stages.Wrapped
    read_pages: jax.stages.Wrapped
    write_pages: jax.stages.Wrapped


def jit_programs(config: ModelConfig, cache: KVCache, state: SlotState, *, max_steps: int) -> Programs:
    """The programs of an engine. Engines of one model, mesh and layout share them, so that the second one of a process compiles nothing.

    Args:
        config: the model, fitted to its mesh.
        cache, state: arrays, or shapes with shardings; only their shardings are read.
        max_steps: see :func:`decode`.
    """
    shardings, tree = jax.tree.flatten(jax.tree.map(lambda leaf: leaf.sharding, (cache, state)))
    return _jitted(config, tuple(shardings), tree, max_steps, ops.choices(config.partition))


@functools.lru_cache(maxsize=8)
def _jitted(config: ModelConfig, shardings: tuple[jax.sharding.Sharding, ...], tree: jax.tree_util.PyTreeDef, max_steps: int,
            choices: tuple[bool, ...]) -> Programs:
    """``choices`` is what tracing asks the process: it is only here to tell programs apart."""
    cache_at, state_at = jax.tree.unflatten(tree, shardings)
    everywhere = config.partition.sharding(())
    return Programs(
        step=jax.jit(functools.partial(step, config=config), static_argnames="scores_prompt", donate_argnums=(1, 2),
                     out_shardings=(cache_at, state_at, everywhere, everywhere)),
        decode=jax.jit(functools.partial(decode, config=config, max_steps=max_steps), static_argnames="num_rows", donate_argnums=(1, 2),
                       out_shardings=(cache_at, state_at, everywhere)),
        start=jax.jit(start, static_argnames="has_adjustments", donate_argnums=0, out_shardings=state_at),
        copy_page=jax.jit(copy_page, donate_argnums=0, out_shardings=cache_at), read_pages=jax.jit(read_pages),
        write_pages=jax.jit(write_pages, donate_argnums=0, out_shardings=cache_at))


def _decode_one(params: DecoderParams, cache: KVCache, rows: SlotState, pages_BL: jax.Array,
                config: ModelConfig) -> tuple[KVCache, SlotState, StepOutput]:
    positions_B1 = jnp.where(rows.is_alive, rows.position, -1)[:, None]
    hidden_B1D, cache = forward(params, _by_rows(rows.token[:, None], config), _by_rows(positions_B1, config), cache, config,
                                table=PageTable(pages_BL), prompt_lens=rows.prompt_len, output="hidden")
    return cache, *_draw(params, hidden_B1D[:, 0], rows, rows.is_alive, config)


def _draw(params: DecoderParams, hidden_BD: jax.Array, state: SlotState, is_drawn_B: jax.Array, config: ModelConfig) -> tuple[SlotState, StepOutput]:
    """The token after each row's last one; rows that none is drawn for stay as they are."""
    position_B = state.position + 1
    sampled = sample(unembed(params, hidden_BD, config), state.sampling, position_B, state.history, vocab_size=config.vocab_size,
                     partition=config.partition)
    remaining_B, status_B = _advance(sampled, state.remaining)

    def keep(new, old):
        return jnp.where(is_drawn_B.reshape(-1, *(1,) * (old.ndim - 1)), new, old)
    drawn = state.replace(token=sampled.token, position=position_B, remaining=remaining_B, is_alive=status_B == RUNNING,
                          history=remember(state.history, sampled.token))
    out = StepOutput(token=jnp.where(is_drawn_B, sampled.token, NO_TOKEN), status=status_B, scores=sampled.scores)
    names = ("token", "position", "remaining", "is_alive", "history")
    return state.replace(**{name: jax.tree.map(keep, getattr(drawn, name), getattr(state, name)) for name in names}), out


def _without_adjustments(state: SlotState) -> SlotState:
    return state.replace(history=None, sampling=state.sampling.replace(adjustments=None))


def _advance(sampled: Sampled, remaining_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(tokens still allowed, status) after one more token."""
    remaining_B = remaining_B - 1
    status_B = jnp.where(sampled.is_stop, STOPPED, jnp.where(remaining_B <= 0, FULL, RUNNING))
    return remaining_B, jnp.where(sampled.is_finite, jnp.where(sampled.has_choice, status_B, NO_CHOICE), NOT_FINITE)


def _score_chunk(params: DecoderParams, hidden_GCD: jax.Array, chunk: Chunk, config: ModelConfig) -> TokenScores:
    logits = unembed(params, hidden_GCD.reshape(chunk.targets.size, -1), config)
    return score(logits, jnp.maximum(chunk.targets, 0).reshape(-1), chunk.num_logprobs.reshape(-1), partition=config.partition)


def _empty_output(max_steps: int, num_rows: int) -> StepOutput:
    def full(*shape, value, dtype=jnp.int32):
        return jnp.full((max_steps, num_rows, *shape), value, dtype)
    scores = TokenScores(logprob=full(value=0, dtype=jnp.float32), rank=full(value=0), top_ids=full(MAX_TOP_LOGPROBS, value=-1),
                         top_logprobs=full(MAX_TOP_LOGPROBS, value=0, dtype=jnp.float32))
    return StepOutput(token=full(value=NO_TOKEN), status=full(value=RUNNING), scores=scores)


def _by_rows(x_BT: jax.Array, config: ModelConfig) -> jax.Array:
    return config.partition.constrain(x_BT, (BATCH, None))
