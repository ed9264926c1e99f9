"""The engine's device programs, as pure functions: a step over pieces of contexts, K decode steps in a loop, and what comes before them.

Rows live in slots. The state of every slot stays on the device between programs, so the next one is dispatched before the last one's tokens
are read. Keys and values lie in pages; which pages a slot's row has comes with every call.
"""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.page_table import PageTable
from sharding_rules.axes import BATCH
from tpllm import ops
from tpllm.engine.slots import TARGET, Cache, SlotState
from tpllm.model.config import ModelConfig
from tpllm.model.decoder import forward, unembed
from tpllm.model.kv_cache import KVCache
from tpllm.model.logit_adjustments import remember
from tpllm.model.params import DecoderParams
from tpllm.model.sampling import MAX_TOP_LOGPROBS, Sampled, TokenScores, sample, score

RUNNING, STOPPED, FULL, NOT_FINITE, NO_CHOICE = range(5)
NO_TOKEN = -1
Params = dict[str, DecoderParams]  # of each model, by its name
Drawn = tuple[jax.Array, jax.Array, TokenScores]  # token, status and scores of each row; see StepOutput
Tables = dict[str, jax.Array]  # int32 [B, L] for each group of layers: the pages of each slot's row, counted within its data group


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
        num_steps: int32, how many steps ran.
    """

    token: jax.Array
    status: jax.Array
    scores: TokenScores
    num_steps: jax.Array


def step(params: Params, cache: Cache, state: SlotState, chunk: Chunk, steps_B: jax.Array, tables: Tables, *,
         config: ModelConfig, max_logprobs: int, scores_prompt: bool) -> tuple[Cache, SlotState, StepOutput, TokenScores | None]:
    """Run one chunk; draw a token for each row whose context it completes, and for each one that decodes in it.

    Args:
        params, cache, state, config: the models and the rows; cache and state are donated.
        chunk: the tokens.
        steps_B: int32 [B], how many steps the program may give each row; a row of 0 is paused and stays as it is.
        tables: the rows' pages.
        max_logprobs: the most log probabilities that are reported of a token.
        scores_prompt: whether every token of the chunk is scored.

    Returns:
        The cache, the slots, one token a slot (T = 1), and, where asked for, the scores of the chunk's tokens ([G * C, ...]).
    """
    G, B = chunk.tokens.shape[0], state.token.shape[0]
    may_go_on_B = state.is_alive & (steps_B > 0)
    from_slot_GC, slot_GC = chunk.slot >= 0, jnp.maximum(chunk.slot, 0)
    tokens_GC = jnp.where(from_slot_GC, state.token[slot_GC], chunk.tokens)
    positions_GC = jnp.where(from_slot_GC, jnp.where(may_go_on_B, state.position, -1)[slot_GC], chunk.positions)
    first_slot = (jnp.arange(G) * (B // G)).reshape(G, *(1,) * (chunk.rows.ndim - 1))
    hidden_GCD, cache = _forward(params, tokens_GC, positions_GC, cache, config, {group: PageTable(pages_BL, chunk.rows)
                                 for group, pages_BL in tables.items()}, state.prompt_len[first_slot + chunk.rows])
    last_GR1 = jnp.maximum(chunk.last, 0).reshape(G, B // G, 1)
    hidden_BD = jnp.take_along_axis(hidden_GCD, last_GR1, axis=1).reshape(B, -1)
    is_drawn_B = (chunk.last >= 0) & (may_go_on_B | (chunk.is_complete & (steps_B > 0)))
    state, out = _draw(params, hidden_BD, state, is_drawn_B, config, max_logprobs)
    scores = _score_chunk(params, hidden_GCD, chunk, config, max_logprobs) if scores_prompt else None
    return cache, state, StepOutput(*(jax.tree.map(lambda leaf: leaf[None], part) for part in out), num_steps=jnp.int32(1)), scores


def decode(params: Params, cache: Cache, state: SlotState, steps_B: jax.Array, tables: Tables, *, config: ModelConfig, max_logprobs: int,
           max_steps: int, num_rows: int) -> tuple[Cache, SlotState, StepOutput]:
    """Some tokens for every live slot among the first ``num_rows``; ends early when no row goes on.

    Args:
        params, cache, state, config, max_logprobs: see :func:`step`; cache and state are donated.
        steps_B, tables: see :func:`step`; at most ``max_steps``, the static size of the output, and there are pages for all of them.
        num_rows: how many slots, from the first on, the program computes.
    """
    rows, steps_B, tables = jax.tree.map(lambda leaf: leaf[:num_rows], (state, steps_B, tables))
    page_tables = {group: PageTable(pages_BL) for group, pages_BL in tables.items()}

    def is_drawn(step, changing):
        return changing["is_alive"] & (step < steps_B)

    def run_one(carry):
        step, cache, changing, out = carry
        now, is_drawn_B = rows.replace(**changing), is_drawn(step, changing)
        hidden_B1D, cache = _forward(params, now.token[:, None], jnp.where(is_drawn_B, now.position, -1)[:, None], cache, config, page_tables,
                                     rows.prompt_len)
        now, drawn = _draw(params, hidden_B1D[:, 0], now, is_drawn_B, config, max_logprobs)
        return step + 1, cache, _changing(now), jax.tree.map(lambda all_steps, this: all_steps.at[step].set(this), out, drawn)

    num_steps, cache, changing, out = jax.lax.while_loop(lambda carry: jnp.any(is_drawn(carry[0], carry[2])), run_one,
                                                         (jnp.int32(0), cache, _changing(rows), _empty_output(max_steps, num_rows, max_logprobs)))
    changed = jax.tree.map(lambda slots, part: slots.at[:num_rows].set(part), _changing(state), changing)
    return cache, state.replace(**changed), StepOutput(*out, num_steps=num_steps)


def start(per_row: dict[str, jax.Array], state: SlotState, slot: jax.Array, row: SlotState) -> tuple[dict[str, jax.Array], SlotState]:
    """Put one row into its slot.

    Args:
        per_row, state: of all slots, donated; the row's own part of ``per_row`` is emptied.
        slot: int32.
        row: a state of one slot; where it has None, its slot's part stays what it is.
    """
    per_row = jax.tree.map(lambda slots: slots.at[slot].set(0), per_row)

    def put(new, slots):
        return slots if new is None else slots.at[slot].set(new[0])
    return per_row, jax.tree.map(put, row, state, is_leaf=lambda part: part is None)


def copy_page(pages: dict[str, KVCache], source: jax.Array, target: jax.Array) -> dict[str, KVCache]:
    """The cache's pages, donated, with the content of one in another too."""
    return jax.tree.map(lambda leaf: leaf.at[target].set(leaf[source]), pages)


def read_row(cache: Cache, slot: jax.Array, pages_L: jax.Array) -> Cache:
    """What the cache holds of one row: its pages in order, [L, ...], and its own state. What is read for a negative page means nothing."""
    return Cache(pages=jax.tree.map(lambda leaf: leaf[jnp.maximum(pages_L, 0)], cache.pages),
                 per_row=jax.tree.map(lambda leaf: leaf[slot], cache.per_row))


def write_row(cache: Cache, slot: jax.Array, pages_L: jax.Array, saved: Cache) -> Cache:
    """The cache, donated, with what :func:`read_row` gave in another slot and other pages; negative ones are not written."""
    def write(leaf, old):
        return leaf.at[jnp.where(pages_L < 0, leaf.shape[0], pages_L)].set(old, mode="drop")
    return Cache(pages=jax.tree.map(write, cache.pages, saved.pages),
                 per_row=jax.tree.map(lambda leaf, old: leaf.at[slot].set(old), cache.per_row, saved.per_row))


@dataclasses.dataclass(frozen=True)
class Programs:
    """The functions of this module, jitted: cache and state are donated and come back where they lay."""

    step: jax.stages.Wrapped
    decode: jax.stages.Wrapped
    start: jax.stages.Wrapped
    copy_page: jax.stages.Wrapped
    read_row: jax.stages.Wrapped
    write_row: jax.stages.Wrapped


def jit_programs(config: ModelConfig, cache: Cache, state: SlotState, *, max_steps: int, max_logprobs: int = MAX_TOP_LOGPROBS) -> Programs:
    """The programs of an engine. Engines of one model, mesh and layout share them, so that the second one of a process compiles nothing.

    Args:
        config: the model, fitted to its mesh.
        cache, state: arrays, or shapes with shardings; only their shardings are read.
        max_steps, max_logprobs: see :func:`decode`.
    """
    shardings, tree = jax.tree.flatten(jax.tree.map(lambda leaf: leaf.sharding, (cache, state)))
    return _jitted(config, tuple(shardings), tree, max_steps, max_logprobs, ops.choices(config.partition))


@functools.lru_cache(maxsize=8)
def _jitted(config: ModelConfig, shardings: tuple[jax.sharding.Sharding, ...], tree: jax.tree_util.PyTreeDef, max_steps: int, max_logprobs: int,
            choices: tuple[bool, ...]) -> Programs:
    """``choices`` is what tracing asks the process: it is only here to tell programs apart."""
    cache_at, state_at = jax.tree.unflatten(tree, shardings)
    everywhere = config.partition.sharding(())
    return Programs(
        step=jax.jit(functools.partial(step, config=config, max_logprobs=max_logprobs), static_argnames="scores_prompt", donate_argnums=(1, 2),
                     out_shardings=(cache_at, state_at, everywhere, everywhere)),
        decode=jax.jit(functools.partial(decode, config=config, max_logprobs=max_logprobs, max_steps=max_steps), static_argnames="num_rows",
                       donate_argnums=(1, 2), out_shardings=(cache_at, state_at, everywhere)),
        start=jax.jit(start, donate_argnums=(0, 1), out_shardings=(cache_at.per_row, state_at)),
        copy_page=jax.jit(copy_page, donate_argnums=0, out_shardings=cache_at.pages), read_row=jax.jit(read_row),
        write_row=jax.jit(write_row, donate_argnums=0, out_shardings=cache_at))


def _forward(params: Params, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Cache, config: ModelConfig, tables: dict[str, PageTable],
             prompt_lens: jax.Array) -> tuple[jax.Array, Cache]:
    """Hidden states of the model whose tokens are drawn."""
    hidden_BTD, pages = forward(params[TARGET], _by_rows(tokens_BT, config), _by_rows(positions_BT, config), cache.pages[TARGET], config,
                                tables=tables, prompt_lens=prompt_lens, output="hidden")
    return hidden_BTD, cache.replace(pages={**cache.pages, TARGET: pages})


def _changing(state: SlotState) -> dict[str, Any]:
    """What a token changes."""
    return {name: getattr(state, name) for name in ("token", "position", "remaining", "is_alive", "history")}


def _draw(params: Params, hidden_BD: jax.Array, state: SlotState, is_drawn_B: jax.Array, config: ModelConfig,
          max_logprobs: int) -> tuple[SlotState, Drawn]:
    """The token after each row's last one; rows that none is drawn for stay as they are."""
    position_B, sampling = state.position + 1, state.sampling.only(is_drawn_B)
    sampled = sample(unembed(params[TARGET], hidden_BD, config), sampling, position_B, state.history, vocab_size=config.vocab_size,
                     partition=config.partition, max_logprobs=max_logprobs)
    remaining_B, status_B = _advance(sampled, state.remaining)
    state = state.replace(token=jnp.where(is_drawn_B, sampled.token, state.token), position=jnp.where(is_drawn_B, position_B, state.position),
                          remaining=jnp.where(is_drawn_B, remaining_B, state.remaining),
                          is_alive=jnp.where(is_drawn_B, status_B == RUNNING, state.is_alive),
                          history=remember(state.history, sampled.token, sampling.is_adjusted))
    return state, (jnp.where(is_drawn_B, sampled.token, NO_TOKEN), status_B, sampled.scores)


def _advance(sampled: Sampled, remaining_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(tokens still allowed, status) after one more token."""
    remaining_B = remaining_B - 1
    status_B = jnp.where(sampled.is_stop, STOPPED, jnp.where(remaining_B <= 0, FULL, RUNNING))
    return remaining_B, jnp.where(sampled.is_finite, jnp.where(sampled.has_choice, status_B, NO_CHOICE), NOT_FINITE)


def _score_chunk(params: Params, hidden_GCD: jax.Array, chunk: Chunk, config: ModelConfig, max_logprobs: int) -> TokenScores:
    logits = unembed(params[TARGET], hidden_GCD.reshape(chunk.targets.size, -1), config)
    return score(logits, jnp.maximum(chunk.targets, 0).reshape(-1), chunk.num_logprobs.reshape(-1), partition=config.partition,
                 max_logprobs=max_logprobs)


def _empty_output(max_steps: int, num_rows: int, max_logprobs: int) -> Drawn:
    def full(*shape, value, dtype=jnp.int32):
        return jnp.full((max_steps, num_rows, *shape), value, dtype)
    scores = TokenScores(logprob=full(value=0, dtype=jnp.float32), rank=full(value=0), top_ids=full(max_logprobs, value=-1),
                         top_logprobs=full(max_logprobs, value=0, dtype=jnp.float32))
    return full(value=NO_TOKEN), full(value=RUNNING), scores


def _by_rows(x_BT: jax.Array, config: ModelConfig) -> jax.Array:
    return config.partition.constrain(x_BT, (BATCH, None))
