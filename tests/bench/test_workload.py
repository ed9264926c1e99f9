"""The mixed workload, and what its lengths allow: against a hand-made example and against a count of every step."""
import collections
import heapq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpllm.bench.workload import Item, MixedLengths, Replay, Steps, make_workload, mean_context, replay
from tpllm.errors import ConfigError

SMALL = {"prompt_lens": (4, 40), "output_lens": (2, 30), "output_median": 9.0}


def lens(items: list[Item]) -> list[tuple[int, int]]:
    return [(len(item.prompt_token_ids), item.output_len) for item in items]


def test_the_same_seed_gives_the_same_requests_and_another_seed_others():
    first, again, other = (make_workload(512, MixedLengths(50, seed, **SMALL)) for seed in (3, 3, 4))
    assert first == again
    assert lens(first) != lens(other)
    assert first[0].prompt_token_ids != other[0].prompt_token_ids


def test_lengths_lie_in_their_ranges_reach_both_ends_and_are_spread_as_documented():
    items = make_workload(32000, MixedLengths(20000))
    prompts, outputs = np.array(lens(items)).T
    assert (prompts.min(), prompts.max(), outputs.min(), outputs.max()) == (16, 512, 8, 512)
    assert prompts.mean() == pytest.approx(143, rel=0.03)
    assert outputs.mean() == pytest.approx(173, rel=0.03)
    assert np.median(outputs) == pytest.approx(128, rel=0.05)
    assert (outputs == 512).mean() == pytest.approx(1 / 16, rel=0.1)
    assert {token for item in items[:200] for token in item.prompt_token_ids} <= set(range(32000))


def test_all_come_at_once_or_at_a_mean_rate_in_order_and_with_the_same_lengths():
    at_once, arriving = (make_workload(512, MixedLengths(4000, rate=rate, **SMALL)) for rate in (None, 8.0))
    assert {item.arrival_s for item in at_once} == {0.0}
    times = [item.arrival_s for item in arriving]
    assert times == sorted(times)
    gaps = np.diff(times)
    assert (gaps.mean(), gaps.std()) == (pytest.approx(1 / 8, rel=0.05), pytest.approx(1 / 8, rel=0.1))
    assert [item.prompt_token_ids for item in at_once] == [item.prompt_token_ids for item in arriving]


def test_a_shared_prefix_comes_before_prompts_that_stay_as_they_are():
    plain, shared = (make_workload(512, MixedLengths(9, shared_prefix_len=length, **SMALL)) for length in (0, 20))
    assert len({tuple(item.prompt_token_ids[:20]) for item in shared}) == 1
    assert [item.prompt_token_ids[20:] for item in shared] == [item.prompt_token_ids for item in plain]
    assert MixedLengths(9, shared_prefix_len=20, **SMALL).context_len == 90


def test_a_request_is_greedy_and_goes_on_to_its_last_token():
    params = Item([1, 2], 7).params
    assert (params.temperature, params.max_tokens, params.ignore_eos) == (0.0, 7, True)


def test_the_mean_context_is_that_of_every_token_drawn():
    items = make_workload(512, MixedLengths(30, **SMALL))
    contexts = [len(item.prompt_token_ids) + index for item in items for index in range(item.output_len)]
    assert mean_context(items) == round(np.mean(contexts))


@pytest.mark.parametrize(("options", "message"), [
    ({"prompt_lens": (9, 8)}, "prompt_lens are 9 to 8; give at least 1, and the smaller one first"),
    ({"output_lens": (0, 8)}, "output_lens are 0 to 8"),
    ({"num_requests": 0}, "num_requests is 0, .*at least 1"),
    ({"output_median": 0.0}, "output_median 0.0"),
    ({"rate": 0.0}, "rate is 0.0; it must be above 0"),
])
def test_lengths_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MixedLengths(**options)


def test_the_steps_of_a_hand_made_example():
    # Two slots. Static: (3, 6) takes 2 steps of both rows and 3 of one; (2, 4) takes 1 and 2; (3) takes 2.
    # Continuous: 3 | 6 for 2 steps, 2 | 6 for 1, 4 | 6 for 2, 4 | 3 for 1, and 3 alone for 1.
    assert replay([3, 6, 2, 4, 3], 2) == Replay(static=Steps((0, 7, 3), (0, 5, 3)), continuous=Steps((0, 1, 6), (0, 0, 5)))
    found = replay([3, 6, 2, 4, 3], 2)
    assert (found.static.count, found.continuous.count) == (10, 7)
    assert (found.static.occupancy, found.continuous.occupancy) == (11 / 16, 1.0)
    assert found.static.seconds([0.5, 2.0]) == 7 * 0.5 + 3 * 2.0
    assert found.allowed_gain(prefill_s=4.0, step_s=[0.5, 2.0]) == 13.5 / 16.5
    assert found.allowed_gain(prefill_s=0.0, step_s=[1.0, 1.0]) == 10 / 7


def test_requests_of_one_token_need_no_step():
    assert replay([1, 1, 1], 2) == Replay(static=Steps((0, 0, 0), (0, 0, 0)), continuous=Steps((0, 0, 0), (0, 0, 0)))
    assert replay([1], 2).static.occupancy is None
    assert replay([1, 1, 3, 1, 2], 2).continuous == Steps((0, 1, 1), (0, 0, 0))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 5))
def test_the_steps_are_those_of_every_row_laid_out_in_time(output_lens, num_slots):
    def count(spans: list[tuple[int, int]], start: int) -> Steps:
        rows = collections.Counter(time for first, last in spans for time in range(first, last))
        by_rows, until_empty = (collections.Counter(busy for time, busy in rows.items() if time < end) for end in (10**9, start))
        return Steps(*(tuple(counted[busy] for busy in range(num_slots + 1)) for counted in (by_rows, until_empty)))
    free, continuous = [0] * num_slots, []
    for length in output_lens:
        first = heapq.heappop(free)
        continuous.append((first, first + length - 1))
        heapq.heappush(free, first + length - 1)
    static, begin = [], 0
    for index in range(0, len(output_lens), num_slots):
        batch = [(begin, begin + length - 1) for length in output_lens[index:index + num_slots]]
        static, last_begin, begin = static + batch, begin, max(last for _, last in batch)
    assert replay(output_lens, num_slots) == Replay(count(static, last_begin), count(continuous, continuous[-1][0]))
