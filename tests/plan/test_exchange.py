"""Seconds of collectives: the bytes that the best algorithms send, over the links there are."""
import pytest

from tpllm.plan.exchange import SENT, Exchange, exchange_seconds, total_seconds


@pytest.mark.parametrize(("op", "sent"), [("all-reduce", 1.75), ("all-gather", 0.875), ("reduce-scatter", 7.0), ("all-to-all", 0.875),
                                          ("collective-permute", 1.0)])
def test_bytes_over_the_port_and_a_time_for_each_hop(places, op, sent):
    gpus, hop_s = places("NVIDIA H200", 8), 2e-6
    found = exchange_seconds(op, 450e9, gpus, gpus)
    assert SENT[op](8) == sent
    assert found == pytest.approx(sent + 3 * hop_s * (2 if op == "all-reduce" else 1), rel=1e-12)


def test_one_device_exchanges_nothing_and_shared_memory_has_no_time(places):
    gpus, cpus = places("NVIDIA H200", 8), places("cpu", 8)
    assert exchange_seconds("all-reduce", 1e9, gpus[:1], gpus) == 0
    assert exchange_seconds("all-reduce", 1e9, cpus, cpus) is None


def test_the_total_counts_each_and_is_unknown_where_one_is():
    known, unknown = Exchange("all-reduce", "f32[8]", 8, 3, 32, 0.5), Exchange("all-reduce", "f32[8]", 8, 1, 32, None)
    assert total_seconds([known, known]) == 3.0
    assert total_seconds([known, unknown]) is None
    assert total_seconds([]) == 0
