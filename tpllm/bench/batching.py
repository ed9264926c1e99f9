"""One workload through an engine, by continuous or by static batching: how long it took, and how busy the slots were."""
import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tpllm.bench.timing import Workload
from tpllm.bench.workload import Item, mean_context
from tpllm.engine.engine import Engine
from tpllm.engine.request import Request
from tpllm.errors import TpllmError
from tpllm.llm import LLM

COUNTERS = ("host_s", "waited_s", "num_programs", "num_decode_steps", "num_prefilled_tokens", "num_generated_tokens")
COST_STEPS = (32, 128, 512)  # over which decoding is measured, the more where fewer were too short for the clock


class Timeline:
    """Busy slots and waiting requests over time; what a program found when it began holds until its results were read.

    Attributes:
        times: when something changed, in seconds from the start; the last is the end.
        busy, waiting: from then on.
    """

    def __init__(self):
        self.times: list[float] = []
        self.busy: list[int] = []
        self.waiting: list[int] = []

    def add(self, now: float, busy: int, waiting: int) -> None:
        """Note the state at a time, unless it is the last one's."""
        if not self.times or (busy, waiting) != (self.busy[-1], self.waiting[-1]):
            self.times.append(now)
            self.busy.append(busy)
            self.waiting.append(waiting)

    def end(self, now: float) -> None:
        """Note the end."""
        self.times.append(now)
        self.busy.append(0)
        self.waiting.append(0)

    def mean(self, name: str, *, until: float | None = None) -> float | None:
        """``"busy"`` or ``"waiting"``, weighted by time, up to a time; None where no time passed."""
        ends = np.minimum(self.times, self.times[-1] if until is None else until)
        seconds = np.diff(ends)
        return float(np.dot(getattr(self, name)[:-1], seconds) / seconds.sum()) if seconds.sum() > 0 else None

    def when_queue_emptied(self) -> float:
        """The first time from which no request waited any more."""
        last = max((index for index, waiting in enumerate(self.waiting) if waiting), default=-1)
        return self.times[min(last + 1, len(self.times) - 1)]

    def as_lists(self) -> dict[str, list]:
        """JSON-able."""
        return {"times_s": [round(value, 5) for value in self.times], "busy": self.busy, "waiting": self.waiting}


@dataclasses.dataclass(frozen=True)
class BatchRun:
    """A workload, done.

    Attributes:
        seconds: from the first request to the last token.
        num_requests, num_prompt_tokens, num_output_tokens: of the workload.
        counters: what the engine's metrics counted meanwhile.
        timeline: of the slots.
        num_slots: how many there are.
    """

    seconds: float
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    counters: dict[str, float]
    timeline: Timeline
    num_slots: int

    def numbers(self) -> dict[str, Any]:
        """Speeds, the time's split, and occupancy; JSON-able."""
        host_s, waited_s, num_programs = (self.counters[name] for name in ("host_s", "waited_s", "num_programs"))
        busy = self.timeline.mean("busy", until=self.timeline.when_queue_emptied())
        steps = self.counters["num_decode_steps"]
        return {"seconds": self.seconds, "requests_per_s": self.num_requests / self.seconds,
                "output_tokens_per_s": self.num_output_tokens / self.seconds,
                "total_tokens_per_s": (self.num_prompt_tokens + self.num_output_tokens) / self.seconds, **self.counters,
                "host_share": host_s / self.seconds, "waited_share": waited_s / self.seconds, "host_ms_per_program": 1e3 * host_s / num_programs,
                "slot_occupancy": None if busy is None else busy / self.num_slots,
                "tokens_per_step_and_slot": self.num_output_tokens / (steps * self.num_slots) if steps else None}


def run_continuous(llm: LLM, items: Sequence[Item]) -> BatchRun:
    """All requests at once; the engine gives each its slot as soon as one is free."""
    return _run(llm, [items], len(items))


def run_static(llm: LLM, items: Sequence[Item]) -> BatchRun:
    """As many requests as there are slots, and the next ones only when all of them have ended."""
    size = llm.shapes.max_num_seqs
    return _run(llm, [items[first:first + size] for first in range(0, len(items), size)], len(items))


def _run(llm: LLM, batches: Iterable[Sequence[Item]], num_items: int) -> BatchRun:
    engine, timeline, done = llm.engine, Timeline(), []
    llm.reset_prefix_cache()  # an earlier run had the same prompts
    before, numbers, num_later = count(engine), itertools.count(), num_items
    timeline.add(0.0, 0, num_items)
    start = time.perf_counter()
    for batch in batches:
        num_later -= len(batch)
        done += [(item, engine.add_request(str(next(numbers)), item.prepared(engine))) for item in batch]
        while engine.has_work:
            engine.step()
            timeline.add(time.perf_counter() - start, num_busy(engine), engine.num_waiting + num_later)
    seconds = time.perf_counter() - start
    timeline.end(seconds)
    for item, request in done:
        check_done(item, request)
    after = count(engine)
    return BatchRun(seconds, num_items, sum(len(item.prompt_token_ids) for item, _ in done), sum(item.output_len for item, _ in done),
                    {name: after[name] - before[name] for name in COUNTERS}, timeline, llm.shapes.max_num_seqs)


def count(engine: Engine) -> dict[str, float]:
    """The engine's counters now."""
    return {name: getattr(engine.metrics, name) for name in COUNTERS}


def num_busy(engine: Engine) -> int:
    """Slots that have a row."""
    return sum(sequence is not None for sequence in engine.scheduler.slots)


def check_done(item: Item, request: Request) -> None:
    """Refuse a result of another length.

    Raises:
        TpllmError: the request failed, or ended early.
    """
    completion = request.output.outputs[0]
    if len(completion.token_ids) != item.output_len:
        raise TpllmError(f"request {request.output.request_id} gave {len(completion.token_ids)} of {item.output_len} tokens: "
                         f"{completion.error or completion.finish_reason}")


@dataclasses.dataclass(frozen=True)
class MeasuredCosts:
    """What this engine's work costs, at the contexts of a workload.

    Attributes:
        prefill_token_s: seconds of a prompt's token.
        step_s: of a decode step with 1, 2, ... rows.
    """

    prefill_token_s: float
    step_s: list[float]


def measure_costs(llm: LLM, items: Sequence[Item], *, num_runs: int = 3) -> MeasuredCosts | None:
    """Measure them for one, two, four, ... rows, and take a straight line between; None where decoding is too short for the clock.

    Args:
        llm: warmed up.
        items: whose mean context, and mean prompt, is measured at.
        num_runs: of which the medians count.
    """
    num_slots, vocab_size = llm.shapes.max_num_seqs, llm.config.vocab_size
    prompt_len = round(statistics.mean(len(item.prompt_token_ids) for item in items))
    workload = Workload(vocab_size, batch_size=num_slots, prompt_len=prompt_len, output_len=2)
    prefill_s = statistics.median(workload.time_run(llm).short for _ in range(num_runs))
    known = sorted({*(2**i for i in range(num_slots.bit_length())), num_slots})
    steps = [_step_cost(llm, num_rows, mean_context(items), num_runs=num_runs) for num_rows in known]
    if None in steps:
        return None
    return MeasuredCosts(prefill_s / (num_slots * prompt_len), np.interp(range(1, num_slots + 1), known, steps).tolist())


def _step_cost(llm: LLM, num_rows: int, context: int, *, num_runs: int) -> float | None:
    """Seconds of a decode step at a context, which is the middle of what is measured; None where it is too short for the clock."""
    for num_steps in COST_STEPS:
        num_steps = min(num_steps, llm.shapes.max_model_len - 2)
        prompt_len = max(1, min(context - num_steps // 2, llm.shapes.max_model_len - num_steps - 1))
        workload = Workload(llm.config.vocab_size, batch_size=num_rows, prompt_len=prompt_len, output_len=num_steps + 1)
        step_s = workload.speeds([workload.time_run(llm) for _ in range(num_runs)]).step_s
        if step_s is not None:
            return step_s
    return None
