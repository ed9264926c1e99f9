"""What an engine counts: requests, tokens, times, and what its programs read and computed; and these numbers at one moment, for people, for JSON
and for Prometheus."""
import bisect
import dataclasses
import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Values

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric

from tpllm.engine.plan import StepPlan
from tpllm.engine.request import Sequence
from tpllm.engine.roofline import ProgramCosts
from tpllm.engine.scheduler import Scheduler

TTFT_BOUNDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
INTER_TOKEN_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


class Histogram:
    """Counts of durations, in buckets of seconds.

    Attributes:
        bounds: the upper bounds of the buckets, ascending; one more bucket holds what lies beyond the last.
        counts: the number of values in each bucket.
        total: the sum of the values.
    """

    def __init__(self, bounds: Values[float]):
        self.bounds, self.counts, self.total = tuple(bounds), [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def num_values(self) -> int:
        """How many values were counted."""
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, int]]:
        """(upper bound as text, values up to it), the last one infinite."""
        bounds = [*map(str, self.bounds), "+Inf"]
        return list(zip(bounds, itertools.accumulate(self.counts), strict=True))

    def copy(self) -> "Histogram":
        """A copy that later values do not change."""
        other = Histogram(self.bounds)
        other.counts, other.total = list(self.counts), self.total
        return other

    def to_dict(self) -> dict:
        """JSON-able."""
        return {"bounds": list(self.bounds), "counts": list(self.counts), "total": self.total, "num_values": self.num_values}


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """An engine's numbers; counts and seconds since it was made.

    Attributes:
        num_running, num_waiting: completions in slots, and before them.
        num_pages, num_pages_used, num_pages_known: of the KV cache, all data groups together: all, held by rows, and of known content.
        num_context_tokens, num_reused_tokens: of contexts that got a slot: all, and those that were shared and not computed.
        prefix_hit_rate: the share of the latter.
        num_preemptions: rows that lost their pages.
        num_requests: that were queued.
        num_ended: completions by how they ended.
        num_generated_tokens, num_prefilled_tokens: drawn; of prompts and contexts, computed.
        num_programs, num_decode_steps: of the device.
        tokens_per_s: generated, while programs were under way.
        host_s, waited_s, busy_s: the host's own work; waiting for the device; programs under way.
        host_share: of the host's work in its time and the device's.
        bytes_per_s, flops_per_s: what programs read and computed, by their costs, while they were under way.
        memory_roofline_share, compute_roofline_share: of the devices' most; None where that is not known.
        ttft, inter_token: seconds, from arrival to a request's first token; between tokens.
        kernels: what computes: ``"xla"``, the native kernels and their instruction set, as in ``"native avx2"``, or ``"pallas"``.
        quantization: the schemes that weights are kept in, as in ``"int4, int8"``; None where all are floats.
        load_s: seconds from the model's name to an engine over it; None where parameters were given.
    """

    num_running: int
    num_waiting: int
    num_pages: int
    num_pages_used: int
    num_pages_known: int
    num_context_tokens: int
    num_reused_tokens: int
    prefix_hit_rate: float
    num_preemptions: int
    num_requests: int
    num_ended: dict[str, int]
    num_generated_tokens: int
    num_prefilled_tokens: int
    num_programs: int
    num_decode_steps: int
    tokens_per_s: float
    host_s: float
    waited_s: float
    busy_s: float
    host_share: float
    bytes_per_s: float
    flops_per_s: float
    memory_roofline_share: float | None
    compute_roofline_share: float | None
    ttft: Histogram = dataclasses.field(repr=False)
    inter_token: Histogram = dataclasses.field(repr=False)
    kernels: str
    quantization: str | None
    load_s: float | None

    def to_dict(self) -> dict:
        """JSON-able."""
        return {field.name: value.to_dict() if isinstance(value := getattr(self, field.name), Histogram) else value
                for field in dataclasses.fields(self)}

    def to_prometheus(self) -> str:
        """The text that Prometheus scrapes (its exposition format 0.0.4)."""
        registry = CollectorRegistry()
        registry.register(_Collector(self))
        return generate_latest(registry).decode()


class _Collector:
    def __init__(self, snapshot: Snapshot):
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """The families, as ``prometheus_client`` asks for them."""
        values = self._snapshot
        for name, text in (("num_running", "completions in slots"), ("num_waiting", "completions that wait for a slot"),
                           ("num_pages", "pages of the KV cache"), ("num_pages_used", "pages that rows hold"),
                           ("num_pages_known", "pages of known content"), ("prefix_hit_rate", "share of context tokens that were shared"),
                           ("tokens_per_s", "generated tokens a second"), ("host_share", "share of the host in the time of a step"),
                           ("memory_roofline_share", "bytes read a second over the most"),
                           ("compute_roofline_share", "operations a second over the most"), ("load_s", "seconds in which the model was loaded")):
            if getattr(values, name) is not None:
                yield GaugeMetricFamily(f"tpllm_{name}", text, value=getattr(values, name))
        for name, text in (("num_requests", "requests"), ("num_preemptions", "rows that lost their pages"),
                           ("num_generated_tokens", "drawn tokens"), ("num_prefilled_tokens", "computed tokens of contexts"),
                           ("num_decode_steps", "decode steps"), ("host_s", "seconds of the host's work"), ("waited_s", "seconds of waiting"),
                           ("busy_s", "seconds in which a program was under way")):
            yield CounterMetricFamily(f"tpllm_{name.removeprefix('num_')}", text, value=getattr(values, name))
        ended = CounterMetricFamily("tpllm_ended", "completions that have ended", labels=["finish_reason"])
        for reason, count in values.num_ended.items():
            ended.add_metric([reason], count)
        yield ended
        facts = {"kernels": values.kernels, "quantization": values.quantization or "none"}
        yield InfoMetricFamily("tpllm_model", "what the model runs on", value=facts)
        for name, text in (("ttft", "seconds to the first token"), ("inter_token", "seconds between tokens")):
            histogram = getattr(values, name)
            yield HistogramMetricFamily(f"tpllm_{name}_seconds", text, buckets=histogram.cumulative(), sum_value=histogram.total)


@dataclasses.dataclass
class Metrics:
    """Counters of an engine, from its start.

    Attributes:
        costs: the costs of a pass over the weights, and of a token.
        num_requests: requests that were queued.
        num_ended: completions by how they ended.
        num_generated_tokens: tokens that were drawn.
        num_prefilled_tokens: tokens of prompts, and of contexts computed again, that went through the model.
        num_programs, num_decode_steps: programs and decode steps that were dispatched and read.
        host_s: seconds in which the host planned, packed, dispatched, and made text of what it read.
        waited_s: seconds in which it waited for the device.
        busy_s: seconds in which a program was under way.
        bytes_read, flops: what those programs read and computed, by their costs.
        ttft, inter_token: seconds from a request's arrival to its first token, and from a completion's token to its next.
    """

    costs: ProgramCosts
    num_requests: int = 0
    num_ended: dict[str, int] = dataclasses.field(default_factory=dict)
    num_generated_tokens: int = 0
    num_prefilled_tokens: int = 0
    num_programs: int = 0
    num_decode_steps: int = 0
    host_s: float = 0.0
    waited_s: float = 0.0
    busy_s: float = 0.0
    bytes_read: float = 0.0
    flops: float = 0.0
    ttft: Histogram = dataclasses.field(default_factory=lambda: Histogram(TTFT_BOUNDS))
    inter_token: Histogram = dataclasses.field(default_factory=lambda: Histogram(INTER_TOKEN_BOUNDS))

    def count_program(self, plan: StepPlan, *, num_steps: int, waited_s: float, took_s: float) -> None:
        """Count a program that was read."""
        num_prefilled = sum(piece.count for piece in plan.pieces)
        self.num_programs += 1
        self.num_decode_steps += num_steps
        self.num_prefilled_tokens += num_prefilled
        self.waited_s += waited_s
        self.busy_s += took_s
        context = sum(owner.sequence.context_len for owner in plan.owners) + sum(piece.start + piece.count for piece in plan.pieces)
        self.bytes_read += num_steps * (self.costs.weight_bytes + context * self.costs.token_bytes)
        self.flops += self.costs.token_flops * (num_prefilled + num_steps * len(plan.owners))

    def count_token(self, sequence: Sequence, seconds: float) -> None:
        """Count a token, ``seconds`` after the one before it, or after the request came where it is its first."""
        self.num_generated_tokens += 1
        if len(sequence.completion.token_ids) > 1:
            self.inter_token.add(seconds)
        elif sequence is sequence.request.sequences[0]:
            self.ttft.add(seconds)

    def count_end(self, sequence: Sequence) -> None:
        """Count a completion that has ended."""
        reason = sequence.completion.finish_reason
        self.num_ended[reason] = self.num_ended.get(reason, 0) + 1

    def snapshot(self, scheduler: Scheduler, *, kernels: str, quantization: str | None, load_s: float | None) -> Snapshot:
        """The numbers at this moment, with those of the scheduler's rows and pages, and with what is known of the model."""
        costs, busy_s, steps_s = self.costs, self.busy_s or 1.0, self.host_s + self.waited_s

        def share(value: float, most: float | None) -> float | None:
            return None if most is None else value / busy_s / most
        return Snapshot(
            num_running=len(scheduler.running), num_waiting=len(scheduler.waiting), num_pages=sum(pool.num_pages for pool in scheduler.pools),
            num_pages_used=sum(pool.num_held for pool in scheduler.pools), num_pages_known=sum(pool.num_known for pool in scheduler.pools),
            num_context_tokens=scheduler.num_context_tokens, num_reused_tokens=scheduler.num_reused_tokens,
            prefix_hit_rate=scheduler.num_reused_tokens / max(scheduler.num_context_tokens, 1), num_preemptions=scheduler.num_preemptions,
            num_requests=self.num_requests, num_ended=dict(self.num_ended), num_generated_tokens=self.num_generated_tokens,
            num_prefilled_tokens=self.num_prefilled_tokens, num_programs=self.num_programs, num_decode_steps=self.num_decode_steps,
            tokens_per_s=self.num_generated_tokens / busy_s, host_s=self.host_s, waited_s=self.waited_s, busy_s=self.busy_s,
            host_share=self.host_s / steps_s if steps_s else 0.0, bytes_per_s=self.bytes_read / busy_s, flops_per_s=self.flops / busy_s,
            memory_roofline_share=share(self.bytes_read, costs.peak_bytes_per_s), compute_roofline_share=share(self.flops, costs.peak_flops),
            ttft=self.ttft.copy(), inter_token=self.inter_token.copy(),
            kernels=kernels, quantization=quantization, load_s=load_s)
