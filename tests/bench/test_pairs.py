"""Alternating pairs, and which of them count."""
import json

import pytest

from tpllm.bench.bandwidth import Bandwidth
from tpllm.bench.pairs import Pair, are_steady, measure_pairs, summarize


def pair(ours: float, peer: float, **more: float) -> Pair:
    return Pair({"seconds": 1.0, "tokens_per_s": ours}, {"seconds": 2.0, "tokens_per_s": peer, **more}, Bandwidth((1.0, 2.0)), (0.5,), (0.7,))


def measured(peer_speeds: list[float], *, num_pairs: int, max_repeats: int) -> tuple[list[Pair], list[str]]:
    """The pairs, and the order of what was run."""
    speeds, calls = iter(peer_speeds), []

    def run_ours():
        calls.append("ours")
        return {"tokens_per_s": 100.0}

    def run_peer():
        calls.append("peer")
        return {"tokens_per_s": next(speeds)}

    def measure_bandwidth():
        calls.append("bandwidth")
        return Bandwidth((float(len(calls)),))
    return measure_pairs(run_ours, run_peer, num_pairs=num_pairs, max_repeats=max_repeats, measure_bandwidth=measure_bandwidth), calls


def test_sides_alternate_between_measurements_of_the_bandwidth():
    pairs, calls = measured([10, 10], num_pairs=2, max_repeats=5)
    assert calls == ["bandwidth", "ours", "peer", "bandwidth"] * 2
    assert [pair.bandwidth.samples for pair in pairs] == [(1.0, 4.0), (5.0, 8.0)]
    assert all(len(pair.load_before) == len(pair.load_after) == 3 for pair in pairs)


def test_a_pair_in_which_the_peer_is_slow_is_repeated():
    pairs, _ = measured([10, 8.9, 9.1, 10], num_pairs=3, max_repeats=5)
    assert are_steady(pairs) == [True, False, True, True]


def test_an_early_pair_counts_no_more_once_the_peer_has_been_faster():
    pairs, _ = measured([8, 8, 10, 10, 9.5], num_pairs=3, max_repeats=5)
    assert are_steady(pairs) == [False, False, True, True, True]


def test_repeating_has_an_end_and_the_summary_says_that_too_few_were_steady():
    pairs, _ = measured([10, 1, 2, 3, 4, 5], num_pairs=3, max_repeats=2)
    assert len(pairs) == 5
    summary = summarize(pairs, num_pairs=3)
    assert (summary["is_steady"], summary["num_counted"], summary["num_repeats"]) == (False, 1, 2)


def test_every_speed_of_the_peer_decides():
    assert are_steady([pair(1, 10, other_per_s=5.0), pair(1, 10, other_per_s=10.0), pair(1, 5, other_per_s=10.0)]) == [False, True, False]


def test_medians_are_of_the_pairs_that_count_and_all_are_kept():
    summary = summarize([pair(20, 10), pair(99, 5), pair(30, 10), pair(40, 10)], num_pairs=3)
    assert summary["medians"] == {"seconds": 1.0, "tokens_per_s": 30, "peer_seconds": 2.0, "peer_tokens_per_s": 10, "tokens_ratio": 3.0}
    assert [one["counts"] for one in summary["pairs"]] == [True, False, True, True]
    assert [one["tokens_ratio"] for one in summary["pairs"]] == [2.0, pytest.approx(19.8), 3.0, 4.0]
    assert (summary["num_counted"], summary["num_repeats"], summary["is_steady"]) == (3, 1, True)
    assert json.loads(json.dumps(summary))["pairs"][0]["bandwidth_samples_bytes_per_s"] == [1.0, 2.0]


def test_where_no_pair_is_steady_all_count():
    summary = summarize([pair(20, 10, other_per_s=1.0), pair(40, 1, other_per_s=10.0)], num_pairs=1)
    assert (summary["is_steady"], summary["num_counted"], summary["medians"]["tokens_per_s"]) == (False, 2, 30)
