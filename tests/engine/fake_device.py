"""An executor that computes no model: what it keeps of a token in the cache is a hash of all tokens up to it, which gives the next token.

It does to pages and slots what the programs of ``tpllm.engine.programs`` do, and loses what a program takes that fails, as they do. So a token is
wrong as soon as one page is, and a run of the engine takes milliseconds. A step of it may give a row several tokens, as speculation does: then it
writes to the pages what it does not give, too.
"""
import dataclasses
import random
from typing import Any

import numpy as np

from tests.engine.conftest import CONFIG, make_llm
from tpllm.engine.engine import Engine
from tpllm.engine.executor import MAX_STEPS, LocalExecutor
from tpllm.engine.programs import FULL, NO_TOKEN, RUNNING, STOPPED, Chunk, Programs, StepOutput
from tpllm.engine.runner import Runner
from tpllm.engine.scheduler import Scheduler
from tpllm.engine.shapes import EngineShapes
from tpllm.engine.slots import Cache, SlotState
from tpllm.llm import LLM
from tpllm.model.config import ALL_LAYERS
from tpllm.model.sampling import MAX_TOP_LOGPROBS, TokenScores

REJECTED = -77  # what is in the cache where a step wrote a token that it did not give


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


class FakeExecutor(LocalExecutor):
    """The executor with programs that have hashes for keys, values and logits.

    Args:
        shapes, num_pages: of the engine.
        tokens_per_step: most tokens that a decode step gives a row; how many it gives is drawn.
    """

    def __init__(self, shapes: EngineShapes, *, num_pages: int, tokens_per_step: int = 1):
        self._shapes, self._num_pages, self._tokens_per_step = shapes, num_pages, tokens_per_step
        self._random, self.params, self._saved = random.Random(1), {}, {}
        self._make_arrays()
        self.programs = Programs(step=self._step, decode=self._decode, start=self._start, copy_page=self._copy_page, read_row=self._read_row,
                                 write_row=self._write_row)

    def _make_arrays(self) -> None:
        self.cache = Cache(Donated(np.zeros((self._num_pages, self._shapes.page_size), np.int64)))
        self.state = Donated([None] * self._shapes.max_num_seqs)

    @property
    def num_saved(self) -> int:
        """Rows whose pages are kept."""
        return len(self._saved)

    @staticmethod
    def _start(per_row: dict, state: Donated, slot: np.int32, row: SlotState) -> tuple[dict, Donated]:
        slots = state.take()
        if slot < len(slots):
            sampling = row.sampling
            noise = (*sampling.seed[0].tolist(), int(sampling.sample_index[0])) if sampling.temperature[0] else ()
            slots[slot] = {"token": int(row.token[0]), "position": int(row.position[0]), "is_alive": bool(row.is_alive[0]), "noise": noise,
                           "remaining": int(row.remaining[0]), "stop_ids": set(sampling.stop_ids[0].tolist()),
                           "stop_from": int(sampling.stop_from[0])}
        return per_row, Donated(slots)

    def _step(self, _params, cache: Cache, state: Donated, chunk: Chunk, steps_B: np.ndarray, tables: dict[str, np.ndarray], *, scores_prompt: bool):
        cells, slots, table = cache.pages.take(), state.take(), tables[ALL_LAYERS]
        out = _empty_output(1, len(slots))
        for index in range(chunk.tokens.shape[1]):
            slot, token, position = chunk.slot[0, index], chunk.tokens[0, index], chunk.positions[0, index]
            if slot >= 0:
                row = slots[slot]
                token, position = row["token"], row["position"] if row["is_alive"] and steps_B[slot] else -1
            elif position >= 0:
                slot = chunk.rows[0, index] if chunk.rows.ndim == 2 else chunk.rows[0]
            if position >= 0:
                self._write(cells, table[slot], position, token)
        for slot, row in enumerate(slots):
            if chunk.last[slot] >= 0 and steps_B[slot] and (row["is_alive"] or chunk.is_complete[slot]):
                self._draw(cells, table[slot], row, out, (0, slot))
        return Cache(Donated(cells)), Donated(slots), out, _scores(chunk.tokens.size) if scores_prompt else None

    def _decode(self, _params, cache: Cache, state: Donated, steps_B: np.ndarray, tables: dict[str, np.ndarray], *, num_rows: int):
        """Each step gives 1 to ``tokens_per_step`` tokens to each row that may take one."""
        cells, slots, table = cache.pages.take(), state.take(), tables[ALL_LAYERS]
        out = _empty_output(MAX_STEPS * self._tokens_per_step, num_rows)
        num_given, num_steps = [0] * num_rows, 0
        while going_on := [slot for slot, row in enumerate(slots[:num_rows]) if row and row["is_alive"] and num_steps < steps_B[slot]]:
            for slot in going_on:
                self._write_drafts(cells, table[slot], slots[slot]["position"])
                for _ in range(self._random.randint(1, self._tokens_per_step)):
                    if slots[slot]["is_alive"]:
                        self._write(cells, table[slot], slots[slot]["position"], slots[slot]["token"])
                        self._draw(cells, table[slot], slots[slot], out, (num_given[slot], slot))
                        num_given[slot] += 1
            num_steps += 1
        return Cache(Donated(cells)), Donated(slots), out.replace(num_steps=np.int32(num_steps))

    @staticmethod
    def _copy_page(pages: Donated, source: np.int32, target: np.int32) -> Donated:
        cells = pages.take()
        cells[target] = cells[source]
        return Donated(cells)

    @staticmethod
    def _read_row(cache: Cache, _slot: np.int32, pages: np.ndarray) -> np.ndarray:
        return cache.pages.value[np.maximum(pages, 0)]

    @staticmethod
    def _write_row(cache: Cache, _slot: np.int32, pages: np.ndarray, saved: np.ndarray) -> Cache:
        cells = cache.pages.take()
        cells[pages[pages >= 0]] = saved[pages >= 0]
        return Cache(Donated(cells))

    def _write_drafts(self, cells: np.ndarray, pages: np.ndarray, position: int) -> None:
        """What a step writes beyond the tokens that it gives, as far as there are pages."""
        size = self._shapes.page_size
        for draft in range(position + 1, position + self._tokens_per_step):
            if draft // size < len(pages) and pages[draft // size] >= 0:
                cells[pages[draft // size], draft % size] = REJECTED

    def _write(self, cells: np.ndarray, pages: np.ndarray, position: int, token: int) -> None:
        size = self._shapes.page_size
        before = cells[pages[(position - 1) // size], (position - 1) % size] if position else 1
        assert pages[position // size] >= 0
        cells[pages[position // size], position % size] = hash((int(before), int(token), int(position)))

    def _draw(self, cells: np.ndarray, pages: np.ndarray, row: dict[str, Any], out: StepOutput, at: tuple[int, int]) -> None:
        position, size = row["position"], self._shapes.page_size
        token = hash((int(cells[pages[position // size], position % size]), *row["noise"])) % CONFIG.vocab_size
        row["token"], row["position"], row["remaining"] = token, position + 1, row["remaining"] - 1
        status = STOPPED if token in row["stop_ids"] and position + 1 >= row["stop_from"] else RUNNING if row["remaining"] > 0 else FULL
        row["is_alive"] = status == RUNNING
        out.token[at], out.status[at] = token, status


def fake_llm(*, is_native: bool = True, num_pages: int = 8, tokens_per_step: int = 1, tokenizer=None) -> LLM:
    """An LLM of tests/engine's shapes on such a device; few pages, so that rows lose theirs."""
    config = CONFIG if tokenizer is None else dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    llm = make_llm(config=config, tokenizer=tokenizer, prefill_chunk_size=32)
    llm._engine = fake_engine(llm, is_native=is_native, num_pages=num_pages, tokens_per_step=tokens_per_step)
    return llm


def fake_engine(llm: LLM, *, is_native: bool = True, num_pages: int = 8, tokens_per_step: int = 1) -> Engine:
    """An engine on such a device, of the sizes of a real one."""
    shapes = dataclasses.replace(llm.shapes, has_invariant_kernels=is_native)
    runner = Runner(llm.config, llm.params, shapes=shapes, num_pages=num_pages, eos_ids=frozenset(), cache_dtype="float32")
    runner.executor = FakeExecutor(shapes, num_pages=num_pages, tokens_per_step=tokens_per_step)
    return Engine(runner, Scheduler(shapes, num_pages=num_pages, swaps=not is_native, tokens_per_step=tokens_per_step), llm._tokenizer)


def _empty_output(num_steps: int, num_rows: int) -> StepOutput:
    scores = _scores(num_steps * num_rows)
    shaped = {field.name: getattr(scores, field.name).reshape(num_steps, num_rows, *getattr(scores, field.name).shape[1:])
              for field in dataclasses.fields(TokenScores)}
    return StepOutput(token=np.full((num_steps, num_rows), NO_TOKEN), status=np.full((num_steps, num_rows), RUNNING), scores=TokenScores(**shaped),
                      num_steps=np.int32(1))


def _scores(count: int) -> TokenScores:
    return TokenScores(logprob=np.zeros(count, np.float32), rank=np.ones(count, np.int32), top_ids=np.zeros((count, MAX_TOP_LOGPROBS), np.int32),
                       top_logprobs=np.zeros((count, MAX_TOP_LOGPROBS), np.float32))
