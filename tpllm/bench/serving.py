"""Requests that arrive while others run, in real time, and what each of their users waits for."""
import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tpllm.bench.batching import Timeline, check_done, count, num_busy
from tpllm.bench.workload import Item
from tpllm.engine.engine import Engine
from tpllm.engine.request import Request
from tpllm.llm import LLM

PERCENTILES = (50, 90, 99)
MAX_SLEEP_S = 0.05


@dataclasses.dataclass
class Served:
    """One request as its user sees it, in seconds of one clock.

    Attributes:
        arrival: when it came; it may have had to wait for the engine to be asked.
        deliveries: (when, how many tokens) each time that there were new ones.
    """

    arrival: float
    deliveries: list[tuple[float, int]] = dataclasses.field(default_factory=list)

    def note(self, now: float, num_tokens: int) -> None:
        """Take note of how many tokens there are by now."""
        num_new = num_tokens - sum(count for _, count in self.deliveries)
        if num_new:
            self.deliveries.append((now, num_new))

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.deliveries[0][0] - self.arrival

    @property
    def end_to_end(self) -> float:
        """Time to the last one."""
        return self.deliveries[-1][0] - self.arrival

    @property
    def spans(self) -> list[tuple[float, float, int]]:
        """The spans between deliveries: (from when, until when, how many tokens came then)."""
        return [(before, now, num) for (before, _), (now, num) in zip(self.deliveries, self.deliveries[1:], strict=False)]

    @property
    def seconds_per_token(self) -> float:
        """The mean seconds of a token after the first delivery; 0 where there are none."""
        num_later = sum(num for *_, num in self.spans)
        return (self.deliveries[-1][0] - self.deliveries[0][0]) / num_later if num_later else 0.0


class Watch:
    """Steps an engine and notes when its requests get their tokens.

    Args:
        engine: that nobody else steps meanwhile.

    Attributes:
        now: when the last step ended, by ``time.perf_counter``.
    """

    def __init__(self, engine: Engine):
        self.engine, self.now = engine, 0.0
        self._served: dict[int, Served] = {}
        self._num_added = 0

    def add(self, item: Item, *, arrival: float | None = None) -> Request:
        """Queue a request that came now, or at a time that has passed."""
        self._num_added += 1
        now = time.perf_counter() if arrival is None else arrival
        request = self.engine.add_request(str(self._num_added), item.prepared(self.engine))
        self._served[id(request)] = Served(now)
        return request

    def step(self) -> None:
        """Step once."""
        requests, self.now = self.engine.step(is_watched=True), time.perf_counter()
        for request in requests:
            self._served[id(request)].note(self.now, len(request.output.outputs[0].token_ids))

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Step until then, or until there is nothing to do."""
        while not is_done() and self.engine.has_work:
            self.step()

    def of(self, request: Request) -> Served:
        """What was noted of a request."""
        return self._served[id(request)]


def serve(llm: LLM, items: Sequence[Item], *, ttft_limit: float, token_limit: float) -> dict[str, Any]:
    """Requests at their times of arrival until all have ended; JSON-able.

    Args:
        llm: warmed up.
        items: in order of arrival.
        ttft_limit, token_limit: seconds to the first token, and for each further one in the mean, that still are good service.
    """
    llm.reset_prefix_cache()
    engine = llm.engine
    watch, timeline, pending, done, before = Watch(engine), Timeline(), collections.deque(items), [], count(engine)
    start = time.perf_counter()
    timeline.add(0.0, 0, 0)
    while pending or engine.has_work:
        now = time.perf_counter() - start
        while pending and pending[0].arrival_s <= now:
            done.append((pending[0], watch.add(pending[0], arrival=start + pending.popleft().arrival_s)))
        if engine.has_work:
            watch.step()
            now = watch.now - start
        else:
            time.sleep(min(max(pending[0].arrival_s - now, 0.0), MAX_SLEEP_S))
        timeline.add(now, num_busy(engine), engine.num_waiting)
    seconds = time.perf_counter() - start
    timeline.end(seconds)
    for item, request in done:
        check_done(item, request)
    counted = {name: value - before[name] for name, value in count(engine).items()}
    served = [watch.of(request) for _, request in done]
    good = sum(one.ttft <= ttft_limit and one.seconds_per_token <= token_limit for one in served)
    num_tokens = sum(item.output_len for item in items)
    return {"seconds": seconds, "requests_per_s": len(items) / seconds, "output_tokens_per_s": num_tokens / seconds,
            "goodput_requests_per_s": good / seconds, "good_share": good / len(items), **latencies(served),
            "mean_waiting": timeline.mean("waiting"), "max_waiting": max(timeline.waiting),
            "slot_occupancy": (timeline.mean("busy") or 0.0) / llm.shapes.max_num_seqs, "host_share": counted["host_s"] / seconds, **counted,
            "timeline": timeline.as_lists()}


def latencies(served: Iterable[Served]) -> dict[str, dict[str, float | None]]:
    """Percentiles of what users waited for, in seconds."""
    served = list(served)
    spans = [span for one in served for span in one.spans]
    return {"ttft_s": percentiles(one.ttft for one in served), "inter_token_s": percentiles(inter_token(spans)),
            "delivery_gap_s": percentiles(now - before for before, now, _ in spans),
            "end_to_end_s": percentiles(one.end_to_end for one in served)}


def inter_token(spans: Iterable[tuple[float, float, int]]) -> list[float]:
    """Seconds of each token: tokens that came together share the time before them."""
    return [(now - before) / num for before, now, num in spans for _ in range(num)]


def percentiles(values: Iterable[float]) -> dict[str, float | None]:
    """p50, p90 and p99; None where there are no values."""
    values = list(values)
    return {f"p{rank}": float(np.percentile(values, rank)) if values else None for rank in PERCENTILES}
