"""What an engine counts: requests, tokens, times, and what its programs read and computed."""
import bisect
import dataclasses
import itertools
from collections.abc import Sequence as Values

from tpllm.engine.plan import StepPlan
from tpllm.engine.request import Sequence
from tpllm.engine.roofline import ProgramCosts

TTFT_BOUNDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
INTER_TOKEN_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


class Histogram:
    """Counts of seconds under each of some bounds.

    Attributes:
        bounds: upper ones, ascending; beyond the last is one bucket more.
        counts: values in each bucket.
        total: sum of the values.
    """

    def __init__(self, bounds: Values[float]):
        self.bounds, self.counts, self.total = tuple(bounds), [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def num_values(self) -> int:
        """How many were counted."""
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, int]]:
        """(upper bound as text, values up to it), the last one infinite."""
        bounds = [*map(str, self.bounds), "+Inf"]
        return list(zip(bounds, itertools.accumulate(self.counts), strict=True))

    def copy(self) -> "Histogram":
        """One that does not change."""
        other = Histogram(self.bounds)
        other.counts, other.total = list(self.counts), self.total
        return other

    def to_dict(self) -> dict:
        """JSON-able."""
        return {"bounds": list(self.bounds), "counts": list(self.counts), "total": self.total, "num_values": self.num_values}


@dataclasses.dataclass
class Metrics:
    """Counters of an engine, from its start.

    Attributes:
        costs: of a pass over the weights, and of a token.
        num_requests: that were queued.
        num_ended: completions by how they ended.
        num_generated_tokens: drawn.
        num_prefilled_tokens: of prompts, and of contexts computed again, that went through the model.
        num_programs, num_decode_steps: dispatched and read.
        host_s: seconds in which the host planned, packed, dispatched, and made text of what it read.
        waited_s: seconds in which it waited for the device.
        busy_s: seconds in which a program was under way.
        bytes_read, flops: of those programs, by their costs.
        ttft, inter_token: seconds from arrival to a request's first token; from a completion's token to its next.
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
