"""Packing plans and rows into the padded arrays that the device programs take."""
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tpllm.engine.plan import Piece, StepPlan
from tpllm.engine.programs import Chunk, SlotState
from tpllm.engine.request import Sequence as RowSequence
from tpllm.model.logit_adjustments import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, NEVER, Adjustments, History
from tpllm.model.sampling import SamplingRows

SMALLEST, LARGEST = 1e-30, 1e30  # a positive parameter beyond these acts like them in float32, and would overflow there


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


def pack_row(sequence: RowSequence | None, *, is_alive: bool, eos_ids: Iterable[int], num_stop_ids: int, vocab_size: int) -> SlotState:
    """The state of one slot [1] whose row begins, or goes on after it lost its slot; None for an empty one.

    Args:
        sequence: the row.
        is_alive: whether it decodes at once, its keys and values being there.
        eos_ids, num_stop_ids, vocab_size: of the model; room for stop ids; padded.
    """
    def ints(value):
        return np.array([0 if sequence is None else value(sequence)], np.int32)
    completion = [] if sequence is None else sequence.completion.token_ids
    counts, recent = np.zeros((1, vocab_size), np.int32), np.full((1, MAX_BAD_WORD_TOKENS - 1), NEVER, np.int32)
    if completion:
        np.add.at(counts[0], completion, 1)
        recent[0, -len(completion):] = completion[1 - MAX_BAD_WORD_TOKENS:]
    return SlotState(
        token=ints(lambda row: row.context(row.context_len - 1, row.context_len)[0]), position=ints(lambda row: row.context_len - 1),
        is_alive=np.array([is_alive]), remaining=ints(lambda row: row.max_new_tokens - len(row.completion.token_ids)),
        prompt_len=ints(lambda row: row.prompt_len), sampling=_pack_sampling([sequence], eos_ids, num_stop_ids, vocab_size),
        history=History(counts=counts, recent=recent))


def _pack_sampling(sequences: Sequence[RowSequence | None], eos_ids: Iterable[int], num_stop_ids: int, vocab_size: int) -> SamplingRows:
    def pack(value, default, dtype):
        return np.array([default if sequence is None else value(sequence, sequence.request.params) for sequence in sequences], dtype)

    def stops(sequence, params):
        ids = sorted({*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)})
        return ids + [-1] * (num_stop_ids - len(ids))
    return SamplingRows(
        temperature=pack(lambda _, p: _within_float32(p.temperature), 0, np.float32), top_k=pack(lambda _, p: max(p.top_k, 0), 0, np.int32),
        top_p=pack(lambda _, p: _within_float32(p.top_p), 1, np.float32), min_p=pack(lambda _, p: _within_float32(p.min_p), 0, np.float32),
        seed=pack(lambda s, _: (s.request.seed >> 32, s.request.seed & 0xFFFFFFFF), (0, 0), np.uint32),
        sample_index=pack(lambda s, _: s.completion.index, 0, np.uint32), stop_ids=pack(stops, [-1] * num_stop_ids, np.int32),
        stop_from=pack(lambda s, p: s.prompt_len + min(p.min_tokens, s.max_new_tokens), 0, np.int32),
        num_logprobs=pack(lambda _, p: -1 if p.logprobs is None else p.logprobs, -1, np.int32),
        adjustments=_pack_adjustments(sequences, vocab_size))


def _within_float32(value: float) -> float:
    """0 stays 0."""
    return value and min(max(value, SMALLEST), LARGEST)


def _pack_adjustments(sequences: Sequence[RowSequence | None], vocab_size: int) -> Adjustments:
    count = len(sequences)
    packed = Adjustments(
        is_used=np.zeros(count, bool), bias=np.zeros((count, vocab_size), np.float32), presence=np.zeros(count, np.float32),
        frequency=np.zeros(count, np.float32), repetition=np.ones(count, np.float32), in_prompt=np.zeros((count, vocab_size), bool),
        bad_words=np.full((count, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, np.int32))
    for row, sequence in enumerate(sequences):
        if sequence is None or not sequence.request.params.adjusts_logits:
            continue
        params = sequence.request.params
        packed.is_used[row] = True
        packed.presence[row], packed.frequency[row] = params.presence_penalty, params.frequency_penalty
        packed.repetition[row] = _within_float32(params.repetition_penalty)
        packed.in_prompt[row, sequence.request.output.prompt_token_ids] = True
        if params.allowed_token_ids is not None:
            packed.bias[row] = -np.inf
            packed.bias[row, list(params.allowed_token_ids)] = 0
        for token, bias in params.logit_bias.items():
            packed.bias[row, token] += bias
        for index, word in enumerate(sequence.request.bad_words):
            if len(word) == 1:
                packed.bias[row, word[0]] = -np.inf
            else:
                packed.bad_words[row, index, -len(word):] = word
    return packed
