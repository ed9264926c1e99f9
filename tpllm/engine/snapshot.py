"""What an engine is doing, as numbers at one moment: for people, for JSON, and for Prometheus."""
import dataclasses
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from tpllm.engine.engine import Engine
from tpllm.engine.metrics import Histogram


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """An engine's numbers; counts and seconds since it was made.

    Attributes:
        num_running, num_waiting: completions in slots, and before them.
        num_pages, num_pages_used, num_pages_known: of the KV cache, all data groups together: all, held by rows, and of known content.
        prefix_hit_rate: share of the tokens of contexts that were shared and not computed.
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
    """

    num_running: int
    num_waiting: int
    num_pages: int
    num_pages_used: int
    num_pages_known: int
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
                           ("compute_roofline_share", "operations a second over the most")):
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
        for name, text in (("ttft", "seconds to the first token"), ("inter_token", "seconds between tokens")):
            histogram = getattr(values, name)
            yield HistogramMetricFamily(f"tpllm_{name}_seconds", text, buckets=histogram.cumulative(), sum_value=histogram.total)


def take_snapshot(engine: Engine) -> Snapshot:
    """The numbers of an engine now."""
    metrics, scheduler = engine.metrics, engine.scheduler
    costs, busy_s, steps_s = metrics.costs, metrics.busy_s or 1.0, metrics.host_s + metrics.waited_s

    def share(value: float, most: float | None) -> float | None:
        return None if most is None else value / busy_s / most
    return Snapshot(
        num_running=len(scheduler.running), num_waiting=len(scheduler.waiting), num_pages=sum(pool.num_pages for pool in scheduler.pools),
        num_pages_used=sum(pool.num_held for pool in scheduler.pools), num_pages_known=sum(pool.num_known for pool in scheduler.pools),
        prefix_hit_rate=scheduler.num_reused_tokens / max(scheduler.num_context_tokens, 1), num_preemptions=scheduler.num_preemptions,
        num_requests=metrics.num_requests, num_ended=dict(metrics.num_ended), num_generated_tokens=metrics.num_generated_tokens,
        num_prefilled_tokens=metrics.num_prefilled_tokens, num_programs=metrics.num_programs, num_decode_steps=metrics.num_decode_steps,
        tokens_per_s=metrics.num_generated_tokens / busy_s, host_s=metrics.host_s, waited_s=metrics.waited_s, busy_s=metrics.busy_s,
        host_share=metrics.host_s / steps_s if steps_s else 0.0, bytes_per_s=metrics.bytes_read / busy_s, flops_per_s=metrics.flops / busy_s,
        memory_roofline_share=share(metrics.bytes_read, costs.peak_bytes_per_s), compute_roofline_share=share(metrics.flops, costs.peak_flops),
        ttft=metrics.ttft.copy(), inter_token=metrics.inter_token.copy())
