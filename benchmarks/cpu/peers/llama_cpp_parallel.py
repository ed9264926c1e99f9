"""llama.cpp's parallel decoding: many requests over a few sequences, by continuous batching through its batch API.

Each call of ``llama_decode`` has the next token of every sequence that decodes, and prompt tokens of those that were admitted, up to a batch. As in
``benchmarks.cpu.peers.llama_cpp_model``, nothing of JAX or tpllm is imported here.
"""
import collections
import ctypes
import dataclasses
import time
from collections.abc import Sequence

import llama_cpp
import numpy as np

from benchmarks.cpu.peers.cells import PAUSE_S
from benchmarks.cpu.peers.llama_cpp_model import ATTENTIONS, CACHE_BLOCK, NUM_TRIALS, PeerModel, best_attention

BATCH = 512  # most tokens of one call, all computed at once
CACHES = {"unified": True, "split": False}  # one buffer of keys and values for all sequences, or one for each


@dataclasses.dataclass(frozen=True)
class PeerRequest:
    """A prompt, and how many tokens it gets."""

    prompt_token_ids: list[int]
    output_len: int


@dataclasses.dataclass
class _Row:
    """A request in its sequence: how much of its prompt is computed, and the tokens it got."""

    index: int
    request: PeerRequest
    num_computed: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)


class ParallelContext:
    """Some sequences of one model and the loop that keeps them busy. Greedy; keys and values in float16.

    Args:
        model: open, for as long as this is.
        num_seqs: sequences at once.
        context_len: tokens of each, prompt and completion.
        num_threads: for prefill and decode alike.
        has_flash_attention: llama.cpp's fused attention, or the one of separate products.
        is_unified: whether all sequences share one buffer of keys and values.

    Raises:
        ValueError: llama.cpp cannot make it.
    """

    def __init__(self, model: PeerModel, *, num_seqs: int, context_len: int, num_threads: int, has_flash_attention: bool, is_unified: bool):
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max, params.n_ctx = num_seqs, num_seqs * -(-context_len // CACHE_BLOCK) * CACHE_BLOCK
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = num_threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if has_flash_attention else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.kv_unified = is_unified
        self._handle = llama_cpp.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise ValueError(f"llama.cpp makes no context of {num_seqs} x {context_len} tokens; its reason is on standard error")
        self._memory, self._vocab_size = llama_cpp.llama_get_memory(self._handle), model.vocab_size
        self._num_seqs, self._context_len = num_seqs, context_len
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._tokens, self._positions, self._num_seq_ids, self._has_logits = (
            np.ctypeslib.as_array(array, (BATCH,)) for array in (self._batch.token, self._batch.pos, self._batch.n_seq_id, self._batch.logits))
        self._num_seq_ids[:] = 1

    def run(self, requests: Sequence[PeerRequest]) -> list[list[int]]:
        """Complete all requests, in their order; the tokens of each.

        Raises:
            ValueError: a request is longer than a sequence's context, or llama.cpp fails.
        """
        longest = max(len(request.prompt_token_ids) + request.output_len for request in requests)
        if longest > self._context_len:
            raise ValueError(f"a request of {longest} tokens is more than a sequence's {self._context_len}; make a larger context")
        llama_cpp.llama_memory_clear(self._memory, True)
        waiting = collections.deque(_Row(index, request) for index, request in enumerate(requests))
        rows: list[_Row | None] = [None] * self._num_seqs
        tokens: list[list[int]] = [[] for _ in requests]
        while waiting or any(rows):
            for seq, row in enumerate(rows):
                if row is None and waiting:
                    rows[seq] = waiting.popleft()
            for seq, token in self._decode(rows):
                row = rows[seq]
                row.tokens.append(token)
                if len(row.tokens) == row.request.output_len:
                    tokens[row.index], rows[seq] = row.tokens, None
                    llama_cpp.llama_memory_seq_rm(self._memory, seq, -1, -1)
        return tokens

    def _decode(self, rows: Sequence[_Row | None]) -> list[tuple[int, int]]:
        """One call; (sequence, token) of those that got one."""
        ends, used = [], 0
        for seq, row in enumerate(rows):
            if row is not None and row.tokens:
                used = self._put(seq, used, row.tokens[-1:], len(row.request.prompt_token_ids) + len(row.tokens) - 1)
                ends.append((seq, used - 1))
        self._has_logits[:used] = 1
        for seq, row in sorted(((seq, row) for seq, row in enumerate(rows) if row is not None and not row.tokens), key=lambda pair: pair[1].index):
            part = row.request.prompt_token_ids[row.num_computed:row.num_computed + BATCH - used]
            if not part:
                break
            first, used = used, self._put(seq, used, part, row.num_computed)
            self._has_logits[first:used] = 0
            row.num_computed += len(part)
            if row.num_computed == len(row.request.prompt_token_ids):
                self._has_logits[used - 1] = 1
                ends.append((seq, used - 1))
        self._batch.n_tokens = used
        if code := llama_cpp.llama_decode(self._handle, self._batch):
            raise ValueError(f"llama.cpp cannot decode {used} tokens (error {code}); its reason is on standard error")
        return [(seq, int(self._logits(place).argmax())) for seq, place in ends]

    def _put(self, seq: int, first: int, tokens: list[int], position: int) -> int:
        """Put tokens of a sequence into the batch; how many are in it then."""
        last = first + len(tokens)
        self._tokens[first:last], self._positions[first:last] = tokens, range(position, position + len(tokens))
        for place in range(first, last):
            self._batch.seq_id[place][0] = seq
        return last

    def _logits(self, place: int) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self._handle, place)
        return np.frombuffer((ctypes.c_float * self._vocab_size).from_address(ctypes.addressof(pointer.contents)), np.float32)

    def close(self) -> None:
        """Give its memory back."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._handle)


def choose_context(model: PeerModel, requests: Sequence[PeerRequest], **sizes: int) -> tuple[ParallelContext, dict[str, list[float]]]:
    """The fastest of fused attention or not, unified cache or not, warmed up; and the output tokens/s of each in its trials.

    Args:
        model: open.
        requests: of the trials.
        sizes: ``num_seqs``, ``context_len``, ``num_threads``.
    """
    contexts = {f"{attention}, {cache}": ParallelContext(model, has_flash_attention=is_fused, is_unified=is_unified, **sizes)
                for attention, is_fused in ATTENTIONS.items() for cache, is_unified in CACHES.items()}
    trials: dict[str, list[float]] = {name: [] for name in contexts}
    for _ in range(NUM_TRIALS):
        for name, context in contexts.items():
            trials[name].append(time_parallel(context, requests)["output_tokens_per_s"])
    chosen = contexts.pop(best_attention(trials))
    for context in contexts.values():
        context.close()
    return chosen, trials


def time_parallel(context: ParallelContext, requests: Sequence[PeerRequest]) -> dict[str, float]:
    """Complete all requests once."""
    time.sleep(PAUSE_S)
    start = time.perf_counter()
    tokens = context.run(requests)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "output_tokens_per_s": sum(map(len, tokens)) / seconds}
