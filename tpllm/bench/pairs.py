"""Two programs that take turns on one machine: alternating pairs of runs, repeated where the machine was busy.

A pair says little where something else took the machine during it. The peer is the witness: a pair in which one of its speeds is under 90 % of
its own best counts no more, and another is run in its place. Which pairs count never depends on our own speeds.
"""
import dataclasses
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tpllm.bench.bandwidth import Bandwidth

STEADY_SHARE = 0.9  # of the peer's best
SPEED = "_per_s"  # how the names of speeds end; more is better


@dataclasses.dataclass(frozen=True)
class Pair:
    """One turn of each side.

    Attributes:
        ours, peer: numbers by name; those whose names end in ``_per_s`` are speeds, and are compared where both have them.
        bandwidth: of the memory, before and after.
        load_before, load_after: the load averages of 1, 5 and 15 minutes.
    """

    ours: Mapping[str, float]
    peer: Mapping[str, float]
    bandwidth: Bandwidth
    load_before: tuple[float, ...]
    load_after: tuple[float, ...]

    def numbers(self) -> dict[str, float]:
        """Ours, the peer's as ``peer_...``, and for each speed that both have ours over the peer's as ``..._ratio``."""
        ratios = {f"{name.removesuffix(SPEED)}_ratio": self.ours[name] / self.peer[name] for name in self.ours
                  if name.endswith(SPEED) and name in self.peer}
        return {**self.ours, **{f"peer_{name}": value for name, value in self.peer.items()}, **ratios}


def measure_pairs(run_ours: Callable[[], Mapping[str, float]], run_peer: Callable[[], Mapping[str, float]], *, num_pairs: int, max_repeats: int,
                  measure_bandwidth: Callable[[], Bandwidth]) -> list[Pair]:
    """Run pairs until ``num_pairs`` of them are steady, or ``max_repeats`` more than that have been run."""
    pairs: list[Pair] = []
    while len(pairs) < num_pairs + max_repeats and sum(are_steady(pairs)) < num_pairs:
        load_before, bandwidth = os.getloadavg(), measure_bandwidth()
        ours, peer = run_ours(), run_peer()
        bandwidth += measure_bandwidth()
        pairs.append(Pair(ours, peer, bandwidth, load_before, os.getloadavg()))
    return pairs


def are_steady(pairs: Sequence[Pair]) -> list[bool]:
    """Whether every speed of the peer is, for each pair, at least 90 % of its best, of the later pairs too."""
    names = [name for name in pairs[0].peer if name.endswith(SPEED)] if pairs else []
    best = {name: max(pair.peer[name] for pair in pairs) for name in names}
    return [all(pair.peer[name] >= STEADY_SHARE * best[name] for name in names) for pair in pairs]


def summarize(pairs: Sequence[Pair], *, num_pairs: int) -> dict[str, Any]:
    """Medians of the pairs that count, and every pair as it was. JSON-able.

    Args:
        pairs: as :func:`measure_pairs` gives them.
        num_pairs: how many steady ones were asked for. Where fewer came, ``is_steady`` is False; where none did, all count.
    """
    counts = are_steady(pairs)
    num_steady = sum(counts)
    counts = counts if num_steady else [True] * len(pairs)
    counted = [pair.numbers() for pair, is_counted in zip(pairs, counts, strict=True) if is_counted]
    raw = [{"counts": is_counted, **pair.numbers(), "load_average_before": list(pair.load_before), "load_average_after": list(pair.load_after),
            "bandwidth_samples_bytes_per_s": list(pair.bandwidth.samples)} for pair, is_counted in zip(pairs, counts, strict=True)]
    return {"medians": {name: statistics.median(numbers[name] for numbers in counted) for name in counted[0]}, "num_counted": len(counted),
            "num_repeats": len(pairs) - min(num_pairs, len(pairs)), "is_steady": num_steady >= num_pairs, "pairs": raw}
