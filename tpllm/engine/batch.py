"""Packing sequences into the padded arrays that the device programs take."""
from collections.abc import Iterable, Sequence

import numpy as np

from tpllm.engine.programs import PrefillChunk
from tpllm.engine.request import Sequence as RowSequence
from tpllm.engine.scheduler import PrefillPlan
from tpllm.model.logit_adjustments import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, Adjustments
from tpllm.model.sampling import SamplingRows

SMALLEST, LARGEST = 1e-30, 1e30  # a positive parameter beyond these acts like them in float32, and would overflow there


def pack_prefill(plan: PrefillPlan, *, num_slots: int, num_groups: int, eos_ids: Iterable[int], num_stop_ids: int,
                 vocab_size: int) -> PrefillChunk:
    """One chunk a data group; groups without one are padded."""
    rows_per_group = num_slots // num_groups
    by_group: list[tuple[RowSequence, int] | None] = [None] * num_groups
    for sequence, start in plan.rows:
        by_group[sequence.slot // rows_per_group] = (sequence, start)
    sequences = [row and row[0] for row in by_group]
    tokens, positions, targets = (np.full((num_groups, plan.bucket), fill, np.int32) for fill in (0, -1, -1))
    last = np.full(num_groups, -1, np.int32)
    for group, row in enumerate(by_group):
        if row is None:
            continue
        (sequence, start), prompt = row, row[0].request.output.prompt_token_ids
        count = min(plan.bucket, len(prompt) - start)
        tokens[group, :count] = prompt[start:start + count]
        positions[group, :count] = np.arange(start, start + count)
        following = prompt[start + 1:start + count + 1]
        targets[group, :len(following)] = following
        if start + count == len(prompt):
            last[group] = count - 1

    def ints(value, default):
        return np.array([default if sequence is None else value(sequence) for sequence in sequences], np.int32)
    return PrefillChunk(
        tokens=tokens, positions=positions, targets=targets, row=ints(lambda s: s.slot % rows_per_group, 0), slot=ints(lambda s: s.slot, num_slots),
        last=last, remaining=ints(lambda s: s.max_new_tokens, 0), prompt_len=ints(lambda s: s.prompt_len, 1),
        sampling=_pack_sampling(sequences, eos_ids, num_stop_ids, vocab_size),
        num_prompt_logprobs=ints(lambda s: -1 if s.request.params.prompt_logprobs is None else s.request.params.prompt_logprobs, -1))


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
