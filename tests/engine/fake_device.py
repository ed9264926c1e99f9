"""A device that computes no model: what it keeps of a token in the cache is a hash of all tokens up to it, which gives the next token.

It does to pages and slots what the programs of ``tpllm.engine.programs`` do, and takes donated arrays as they do. So a token is wrong as soon as
one page is, and a run of the engine takes milliseconds.
"""
import dataclasses
from typing import Any

import numpy as np

from tests.engine.conftest import CONFIG, make_llm
from tpllm.engine.engine import Engine
from tpllm.engine.programs import FULL, NO_TOKEN, RUNNING, STOPPED, Chunk, Programs, SlotState, StepOutput
from tpllm.engine.runner import MAX_STEPS, Runner
from tpllm.engine.scheduler import Scheduler
from tpllm.llm import LLM
from tpllm.model.sampling import MAX_TOP_LOGPROBS, TokenScores


class Donated:
    """Arrays on the device, until a program takes them."""

    def __init__(self, value: Any):
        self._value, self.is_taken = value, False

    def take(self) -> Any:
        """What they hold; nobody else gets it any more."""
        self.block_until_ready()
        self.is_taken = True
        return self._value

    @property
    def value(self) -> Any:
        """What they hold."""
        self.block_until_ready()
        return self._value

    def block_until_ready(self) -> None:
        """Raises as JAX does where they were taken."""
        if self.is_taken:
            raise RuntimeError("Array has been deleted.")


class FakeRunner(Runner):
    """The runner with hashes for keys, values and logits."""

    _programs: Programs | None = None

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._programs = Programs(step=self._step, decode=self._decode, start=self._begin, copy_page=self._copy_page, read_pages=self._read_pages,
                                  write_pages=self._write_pages)
        self._make_arrays()

    def _make_arrays(self) -> None:
        if self._programs is None:  # those whose shardings the real programs take
            super()._make_arrays()
            return
        self.cache = Donated(np.zeros((self.num_pages, self.shapes.page_size), np.int64))
        self.state = Donated([None] * self.shapes.max_num_seqs)

    def _step(self, _params, cache: Donated, state: Donated, chunk: Chunk, is_kept: np.ndarray, table: np.ndarray, *, scores_prompt: bool):
        cells, slots = cache.take(), _kept(state.take(), is_kept)
        out = _empty_output(1, len(slots))
        for index in range(chunk.tokens.shape[1]):
            slot, token, position = chunk.slot[0, index], chunk.tokens[0, index], chunk.positions[0, index]
            if slot >= 0:
                row = slots[slot]
                token, position = row["token"], row["position"] if row["is_alive"] else -1
            elif position >= 0:
                slot = chunk.rows[0, index] if chunk.rows.ndim == 2 else chunk.rows[0]
            if position >= 0:
                self._write(cells, table[slot], position, token)
        for slot, row in enumerate(slots):
            if chunk.last[slot] >= 0 and (row["is_alive"] or chunk.is_complete[slot]):
                self._draw(cells, table[slot], row, out, (0, slot))
        return Donated(cells), Donated(slots), out, _scores(chunk.tokens.size) if scores_prompt else None

    def _decode(self, _params, cache: Donated, state: Donated, is_kept: np.ndarray, table: np.ndarray, num_steps: np.int32, *, num_rows: int):
        cells, slots = cache.take(), _kept(state.take(), is_kept)
        out = _empty_output(MAX_STEPS, num_rows)
        for step in range(num_steps):
            for slot, row in enumerate(slots[:num_rows]):
                if row is not None and row["is_alive"]:
                    self._write(cells, table[slot], row["position"], row["token"])
                    self._draw(cells, table[slot], row, out, (step, slot))
        return Donated(cells), Donated(slots), out

    def _write(self, cells: np.ndarray, pages: np.ndarray, position: int, token: int) -> None:
        size = self.shapes.page_size
        before = cells[pages[(position - 1) // size], (position - 1) % size] if position else 1
        assert pages[position // size] >= 0
        cells[pages[position // size], position % size] = hash((int(before), int(token), int(position)))

    def _draw(self, cells: np.ndarray, pages: np.ndarray, row: dict[str, Any], out: StepOutput, at: tuple[int, int]) -> None:
        position, size = row["position"], self.shapes.page_size
        token = hash((int(cells[pages[position // size], position % size]), *row["noise"])) % CONFIG.vocab_size
        row["token"], row["position"], row["remaining"] = token, position + 1, row["remaining"] - 1
        status = STOPPED if token in row["stop_ids"] and position + 1 >= row["stop_from"] else RUNNING if row["remaining"] > 0 else FULL
        row["is_alive"] = status == RUNNING
        out.token[at], out.status[at] = token, status

    @staticmethod
    def _begin(state: Donated, slot: np.int32, row: SlotState, *, has_adjustments: bool) -> Donated:
        slots = state.take()
        if slot < len(slots):
            sampling = row.sampling
            noise = (*sampling.seed[0].tolist(), int(sampling.sample_index[0])) if sampling.temperature[0] else ()
            slots[slot] = {"token": int(row.token[0]), "position": int(row.position[0]), "is_alive": bool(row.is_alive[0]), "noise": noise,
                           "remaining": int(row.remaining[0]), "stop_ids": set(sampling.stop_ids[0].tolist()),
                           "stop_from": int(sampling.stop_from[0])}
        return Donated(slots)

    @staticmethod
    def _copy_page(cache: Donated, source: np.int32, target: np.int32) -> Donated:
        cells = cache.take()
        cells[target] = cells[source]
        return Donated(cells)

    @staticmethod
    def _read_pages(cache: Donated, pages: np.ndarray) -> np.ndarray:
        return cache.value[np.maximum(pages, 0)]

    @staticmethod
    def _write_pages(cache: Donated, pages: np.ndarray, saved: np.ndarray) -> Donated:
        cells = cache.take()
        cells[pages[pages >= 0]] = saved[pages >= 0]
        return Donated(cells)


def fake_llm(*, is_native: bool = True, num_pages: int = 8, tokenizer=None) -> LLM:
    """An LLM of tests/engine's shapes on such a device; few pages, so that rows lose theirs."""
    config = CONFIG if tokenizer is None else dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    llm = make_llm(config=config, tokenizer=tokenizer, prefill_chunk_size=32)
    llm._engine = fake_engine(llm, is_native=is_native, num_pages=num_pages)
    return llm


def fake_engine(llm: LLM, *, is_native: bool = True, num_pages: int = 8) -> Engine:
    """An engine on such a device, of the sizes of a real one."""
    shapes = dataclasses.replace(llm.shapes, has_invariant_kernels=is_native)
    runner = FakeRunner(llm.config, llm.params, shapes=shapes, num_pages=num_pages, eos_ids=frozenset(), cache_dtype="float32")
    return Engine(runner, Scheduler(shapes, num_pages=num_pages, swaps=not is_native), llm._tokenizer)


def _kept(slots: list, is_kept: np.ndarray) -> list:
    return [row and {**row, "is_alive": row["is_alive"] and bool(kept)} for row, kept in zip(slots, is_kept, strict=True)]


def _empty_output(num_steps: int, num_rows: int) -> StepOutput:
    scores = _scores(num_steps * num_rows)
    shaped = {field.name: getattr(scores, field.name).reshape(num_steps, num_rows, *getattr(scores, field.name).shape[1:])
              for field in dataclasses.fields(TokenScores)}
    return StepOutput(token=np.full((num_steps, num_rows), NO_TOKEN), status=np.full((num_steps, num_rows), RUNNING), scores=TokenScores(**shaped))


def _scores(count: int) -> TokenScores:
    return TokenScores(logprob=np.zeros(count, np.float32), rank=np.ones(count, np.int32), top_ids=np.zeros((count, MAX_TOP_LOGPROBS), np.int32),
                       top_logprobs=np.zeros((count, MAX_TOP_LOGPROBS), np.float32))
