"""Packing a plan into the padded arrays that the device programs take."""
from collections.abc import Iterator

import numpy as np

from tpllm.engine.plan import Piece, StepPlan
from tpllm.engine.programs import Chunk
from tpllm.engine.request import Sequence
from tpllm.model.per_row import Row


def pack_chunk(plan: StepPlan, *, num_slots: int, num_groups: int, is_ragged: bool) -> Chunk:
    """The tokens of a plan's pieces, and a place for the last one of each row that decodes beside them.

    Args:
        plan: with pieces; none at all is a chunk of padding.
        num_slots, num_groups: slots, and the data groups they are cut into in order.
        is_ragged: whether a group's tokens may be of several rows.
    """
    rows_per_group, shape = num_slots // num_groups, (num_groups, plan.bucket)
    tokens, positions, slots, targets, num_logprobs = (np.full(shape, fill, np.int32) for fill in (0, -1, -1, -1, -1))
    rows = np.zeros(shape if is_ragged else num_groups, np.int32)
    last, is_complete = np.full(num_slots, -1, np.int32), np.zeros(num_slots, bool)
    used = [0] * num_groups

    def take(slot: int, group: int, where: slice) -> tuple[int, slice]:
        rows[(group, where) if is_ragged else group] = slot % rows_per_group
        used[group] = where.stop
        return group, where

    for piece, *place in places_of(plan, num_slots=num_slots, num_groups=num_groups):
        sequence, stop = piece.sequence, piece.start + piece.count
        at = group, where = take(piece.slot, *place)
        tokens[at], positions[at] = sequence.context(piece.start, stop), np.arange(piece.start, stop)
        if stop == sequence.prefill_len:
            last[piece.slot], is_complete[piece.slot] = where.stop - 1, True
        if sequence.wants_prompt_logprobs:
            following = sequence.request.output.prompt_token_ids[piece.start + 1:stop + 1]
            targets[group, where.start:where.start + len(following)] = following
            num_logprobs[at] = sequence.request.params.prompt_logprobs
    for owner in plan.owners:
        if not is_complete[owner.slot]:
            group = owner.slot // rows_per_group
            last[owner.slot] = used[group]
            slots[take(owner.slot, group, slice(used[group], used[group] + 1))] = owner.slot
    return Chunk(tokens=tokens, positions=positions, slot=slots, rows=rows, last=last, is_complete=is_complete, targets=targets,
                 num_logprobs=num_logprobs)


def places_of(plan: StepPlan, *, num_slots: int, num_groups: int) -> Iterator[tuple[Piece, int, slice]]:
    """Each piece of a plan, its data group, and its place among the tokens of that group's chunk."""
    used = [0] * num_groups
    for piece in plan.pieces:
        group = piece.slot * num_groups // num_slots
        yield piece, group, slice(used[group], used[group] + piece.count)
        used[group] += piece.count


def row_of(sequence: Sequence, eos_ids: frozenset[int], *, is_alive: bool = False) -> Row:
    """What the device is told of a sequence that comes to its slot; ``is_alive`` where it decodes at once."""
    request = sequence.request
    return Row(request.params, prompt=request.output.prompt_token_ids, completion=sequence.completion.token_ids, seed=request.seed,
               sample_index=sequence.completion.index, max_new_tokens=sequence.max_new_tokens, eos_ids=eos_ids, bad_words=request.bad_words,
               is_alive=is_alive)
