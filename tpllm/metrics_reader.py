"""An engine's numbers under vLLM's names and as its types, for scripts that read those."""
import dataclasses

from tpllm.engine.metrics import Snapshot


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number with a name; ``labels`` tell apart those of one name."""

    name: str
    labels: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Counter(Metric):
    """A whole number that only grows."""

    value: int


@dataclasses.dataclass(frozen=True)
class Gauge(Metric):
    """A number of now."""

    value: float


@dataclasses.dataclass(frozen=True)
class Vector(Metric):
    """Several counts under one name, such as one for each place of a draft; there are none today."""

    values: list[int]


@dataclasses.dataclass(frozen=True)
class Histogram(Metric):
    """Seconds, counted.

    Attributes:
        count, sum: of all values.
        buckets: upper bound as text -> how many values are at most that.
    """

    count: int
    sum: float
    buckets: dict[str, int]


def metrics_of(values: Snapshot) -> list[Metric]:
    """What vLLM has a name for, of an engine's numbers at one moment."""
    gauges = {"num_requests_running": values.num_running, "num_requests_waiting": values.num_waiting,
              "kv_cache_usage_perc": values.num_pages_used / values.num_pages}
    counters = {"prefix_cache_queries": values.num_context_tokens, "prefix_cache_hits": values.num_reused_tokens,
                "prompt_tokens": values.num_context_tokens, "generation_tokens": values.num_generated_tokens,
                "num_preemptions": values.num_preemptions}
    histograms = {"time_to_first_token_seconds": values.ttft, "inter_token_latency_seconds": values.inter_token}
    return [*(Gauge(f"vllm:{name}", {}, float(value)) for name, value in gauges.items()),
            *(Counter(f"vllm:{name}", {}, value) for name, value in counters.items()),
            *(Counter("vllm:request_success", {"finished_reason": reason}, count) for reason, count in values.num_ended.items()),
            *(Histogram(f"vllm:{name}", {}, one.num_values, one.total, dict(one.cumulative())) for name, one in histograms.items())]
