"""The scheduler: host integers only."""
import pytest

from tpllm import SamplingParams
from tpllm.engine.request import Prepared, Request, Sequence, new_request
from tpllm.engine.scheduler import MAX_PREFILLS_IN_A_ROW, Scheduler
from tpllm.engine.shapes import EngineShapes
from tpllm.model.config import ALL_LAYERS

MAX_LEN = 1024


class Host:
    """A scheduler whose rows get token 7 from every step of every plan."""

    def __init__(self, *, num_slots: int = 4, num_pages: int = 256, is_native: bool = True, chunk: int = 64, **options):
        shapes = EngineShapes(max_num_seqs=num_slots, max_model_len=MAX_LEN, prefill_chunk=chunk, page_size=16, has_invariant_kernels=is_native)
        self.scheduler, self.num_requests = Scheduler(shapes, num_pages=num_pages, swaps=not is_native, **options), 0

    def add(self, prompt: int | list[int], max_tokens: int = 8, **params) -> Request:
        """Queue a request; of a length alone the tokens are its own."""
        self.num_requests += 1
        priority = params.pop("priority", 0)
        tokens = [1000 * self.num_requests + i for i in range(prompt)] if isinstance(prompt, int) else prompt
        prepared = Prepared(None, tokens, SamplingParams(max_tokens=max_tokens, **params), priority)
        request = new_request(str(self.num_requests), prepared, seed=0, max_len=MAX_LEN, tokenizer=None, number=self.num_requests)
        for sequence in request.sequences:
            self.scheduler.add(sequence)
        return request

    def row(self, *args, **params) -> Sequence:
        """The only sequence of :meth:`add`'s request."""
        return self.add(*args, **params).sequences[0]

    def step(self, max_steps: int = 8, token_budget: int | None = None):
        """Plan, and hand out tokens at once."""
        plan = self.scheduler.plan(max_steps, token_budget)
        for owner in plan.owners if plan else ():
            for _ in range(owner.num_steps):
                if owner.is_current:
                    owner.sequence.push(7, 0.0, None)
                    if len(owner.sequence.completion.token_ids) == owner.sequence.max_new_tokens:
                        owner.sequence.finish("length")
                        self.scheduler.release(owner.sequence)
            self.scheduler.commit(owner)
        return plan

    def finish(self) -> int:
        """Step until nothing is left; how many steps that took."""
        for count in range(10_000):
            if not self.scheduler.has_work:
                return count
            self.step()
        raise AssertionError("the rows never end")


def pieces(plan) -> list[tuple[str, int, int]]:
    return [(piece.sequence.request.output.request_id, piece.start, piece.count) for piece in plan.pieces]


def steps_of(plan) -> int:
    return max(owner.num_steps for owner in plan.owners)


def owners(plan) -> list[str]:
    return [owner.sequence.request.output.request_id for owner in plan.owners]


def test_a_prompt_is_cut_at_multiples_of_the_chunk_and_its_rest_takes_the_smallest_bucket_that_holds_it():
    host = Host(is_native=False)
    host.add(150)
    assert [(plan.pieces[0].start, plan.bucket) for plan in (host.step() for _ in range(3))] == [(0, 64), (64, 64), (128, 32)]
    assert not host.step().pieces


def test_without_invariant_kernels_decoding_rows_get_a_step_of_their_own_after_a_few_chunks():
    host = Host(is_native=False)
    host.add(4, max_tokens=100)
    host.step()
    host.add(64 * 10)
    plans = [host.step(8) for _ in range(MAX_PREFILLS_IN_A_ROW + 1)]
    assert [bool(plan.pieces) for plan in plans] == [True] * (MAX_PREFILLS_IN_A_ROW - 1) + [False, True]  # the first row's own came before
    assert owners(plans[-2]) == ["1"]
    assert steps_of(plans[-2]) == 1
    watched = [host.step(8, token_budget=16) for _ in range(4)]
    assert [bool(plan.pieces) for plan in watched] == [False, True, False, True]


def test_with_invariant_kernels_one_program_serves_decoding_rows_and_several_prompts():
    host = Host()
    host.add(5, max_tokens=50)
    host.step()
    host.add(30)
    host.add(40)
    plan = host.step()
    assert pieces(plan) == [("2", 0, 30), ("3", 0, 33)]
    assert owners(plan) == ["1", "2"]
    assert plan.bucket == 64
    plan = host.step()
    assert pieces(plan) == [("3", 33, 7)]
    assert owners(plan) == ["1", "2", "3"]
    assert plan.bucket == 16


def test_a_token_budget_holds_while_rows_decode_and_only_then():
    host = Host()
    host.add(100, max_tokens=1)
    assert pieces(host.step(token_budget=16)) == [("1", 0, 64)]
    host.step()
    host.add(5, max_tokens=50)
    host.step()
    host.add(100)
    assert pieces(host.step(token_budget=16)) == [("3", 0, 15)]


def test_the_last_tokens_of_a_prompt_do_not_take_a_bucket_that_they_leave_empty():
    host = Host(chunk=512)
    host.add(300)
    assert [(plan.pieces[0].count, plan.bucket) for plan in (host.step(), host.step())] == [(256, 256), (44, 64)]


def test_no_more_steps_are_dispatched_than_a_row_may_still_get():
    host = Host()
    row = host.row(4, max_tokens=6)
    scheduler = host.scheduler
    scheduler.plan(8)
    assert [steps_of(scheduler.plan(4)), steps_of(scheduler.plan(4))] == [4, 1]
    assert scheduler.plan(4) is None
    assert scheduler.has_work
    assert not row.may_go_on


def test_while_rows_wait_steps_end_where_the_first_row_may():
    host = Host(num_slots=2)
    host.add(4, max_tokens=60, ignore_eos=True)
    host.add(4, max_tokens=40, min_tokens=9)
    host.add(4)
    host.step()
    assert steps_of(host.step(32)) == 8
    assert steps_of(host.step(32)) == 1


def test_a_freed_slot_goes_to_the_row_that_waited_longest_and_a_lower_priority_comes_first():
    host = Host(num_slots=1)
    rows = [host.row(4), host.row(4), host.row(4), host.row(4, priority=-1)]
    ends = []
    while host.scheduler.has_work:
        host.step()
        ends += [index for index, row in enumerate(rows) if row.is_finished and index not in ends]
    assert ends == [3, 0, 1, 2]


def test_each_data_group_prefills_a_row_of_its_own_where_the_lengths_agree():
    host = Host(is_native=False, num_groups=2)
    for length in (5, 6, 7, 40):
        host.add(length, max_tokens=100)
    assert [(piece.slot, piece.count) for piece in host.step().pieces] == [(0, 5), (2, 7)]
    assert [(piece.slot, piece.count) for piece in host.step().pieces] == [(1, 6)]
    assert [(piece.slot, piece.count) for piece in host.step().pieces] == [(3, 40)]


def test_the_last_row_loses_its_pages_when_they_run_out_and_gets_what_it_has_again():
    host = Host(num_pages=4)
    first, second = host.row(10, max_tokens=40), host.row(10, max_tokens=40)
    host.step()
    while not second.num_preemptions:
        plan = host.step()
    assert first.num_preemptions == 0
    assert plan.saves == ()
    assert second in host.scheduler.waiting
    num_tokens = len(second.completion.token_ids)
    assert num_tokens > 0
    while not first.is_finished:
        host.step()
    assert pieces(host.step()) == [("2", 0, 10 + num_tokens)]
    host.finish()
    assert len(second.completion.token_ids) == 40
    assert host.scheduler.pools[0].num_held == 0


def test_tokens_of_programs_from_before_a_preemption_are_not_wanted():
    host = Host(num_pages=4)
    host.add(10, max_tokens=40)
    second = host.row(10, max_tokens=40)
    host.step()
    plans = []
    while not second.num_preemptions:
        plans.append(host.scheduler.plan(1))
    stale = [owner for plan in plans for owner in plan.owners if owner.sequence is second]
    assert stale
    assert not any(owner.is_current for owner in stale)


def test_a_row_whose_pages_are_kept_is_saved_restored_and_goes_on_decoding():
    host = Host(num_pages=4, is_native=False)
    first, second = host.row(10, max_tokens=40), host.row(10, max_tokens=40)
    saves, restores, prefilled = [], [], 0
    while host.scheduler.has_work:
        plan = host.step()
        saves += plan.saves
        restores += plan.restores
        prefilled += sum(piece.count for piece in plan.pieces)
    assert [move.sequence for move in saves] == [move.sequence for move in restores] == [second] * second.num_preemptions
    assert [move.key for move in saves] == [move.key for move in restores]
    assert second.num_preemptions >= 1
    assert [len(move.pages) for move in saves] == [len(move.pages) for move in restores]
    assert prefilled == 20
    assert len(first.completion.token_ids) == len(second.completion.token_ids) == 40


def test_rows_share_the_pages_of_what_their_prompts_have_in_common():
    host = Host(num_slots=8, chunk=512)
    shared = list(range(100))
    rows = [host.row([*shared, 500 + i], max_tokens=3) for i in range(3)]
    plan = host.step()
    assert pieces(plan) == [("1", 0, 101), ("2", 96, 5), ("3", 96, 5)]
    assert rows[0].pages[:6] == rows[1].pages[:6] == rows[2].pages[:6]
    assert len({row.pages[6] for row in rows}) == 3
    assert [row.request.output.num_cached_tokens for row in rows] == [0, 96, 96]
    host.finish()
    later = host.row(shared, max_tokens=3)
    assert pieces(host.step()) == [("4", 96, 4)]
    assert later.request.output.num_cached_tokens == 96
    host.scheduler.reset_prefix_cache()
    host.add(shared)
    assert pieces(host.step()) == [("5", 0, 100)]


def test_a_page_is_shared_only_where_all_before_it_is_alike():
    host, (first, second, page) = Host(), (list(range(start, start + 16)) for start in (0, 100, 200))
    for prompt in ([*first, *page, 1], [*second, 1]):
        host.add(prompt)
        host.finish()
    host.add([*second, *page, 1])
    assert pieces(host.step()) == [("3", 16, 17)]
    host.add([*page, 1])
    assert pieces(host.step()) == [("4", 0, 17)]


def test_what_a_row_generated_is_found_too_when_a_later_prompt_goes_on_with_it():
    host = Host()
    row = host.row(list(range(10)), max_tokens=40)
    host.finish()
    prompt = [*range(10), *row.completion.token_ids, 3]
    host.add(prompt)
    assert pieces(host.step()) == [("2", 48, 3)]


def test_a_page_whose_last_token_was_drawn_and_not_computed_is_not_found():
    host = Host()
    row = host.row(list(range(10)), max_tokens=6)
    host.finish()
    host.add([*range(10), *row.completion.token_ids, 3])
    assert pieces(host.step()) == [("2", 0, 17)]


def test_without_invariant_kernels_whole_chunks_of_prompts_are_shared_and_nothing_else():
    host = Host(is_native=False, num_slots=2)
    shared = list(range(150))
    host.add(shared, max_tokens=60)
    host.finish()
    host.add([*shared, 9])
    assert pieces(host.step()) == [("2", 128, 23)]


def test_a_prompt_whose_tokens_are_all_scored_is_computed_whole():
    host = Host()
    host.add(list(range(60)), prompt_logprobs=1)
    host.finish()
    host.add(list(range(60)), prompt_logprobs=1)
    assert pieces(host.step()) == [("2", 0, 60)]


def test_prefixes_are_not_shared_where_that_is_off_or_where_the_rope_depends_on_the_prompts_length():
    for options, expected in (({"caches_prefixes": False}, 0), ({"depends_on_prompt_len": True}, 0), ({}, 48)):
        host = Host(**options)
        host.add(list(range(60)))
        host.finish()
        host.add(list(range(61)))
        assert pieces(host.step())[0][1] == expected
    host = Host(depends_on_prompt_len=True)
    host.add(list(range(60)))
    host.finish()
    host.add([*range(59), 7])
    assert pieces(host.step())[0][1] == 48


def test_the_n_rows_of_a_request_compute_its_prompt_once_and_copy_the_page_they_write_to():
    host = Host(num_slots=4)
    request = host.add(40, n=3, max_tokens=20)
    assert pieces(host.step()) == [("1", 0, 40)]
    plan = host.step()
    assert pieces(plan) == [("1", 39, 1), ("1", 39, 1)]
    first, *others = request.sequences
    assert [(source, target) for _, source, target in plan.copies] == [(first.pages[2], row.pages[2]) for row in others]
    assert all(row.pages[:2] == first.pages[:2] for row in others)
    assert len({row.pages[2] for row in request.sequences}) == 3
    host.finish()
    assert host.scheduler.pools[0].num_held == 0


def test_what_a_row_leaves_that_failed_is_not_shared():
    host = Host()
    row = host.row(list(range(60)))
    host.step()
    row.finish("error", error="not finite")
    host.scheduler.release(row)
    host.add(list(range(60)))
    assert pieces(host.step()) == [("2", 0, 60)]


def test_an_aborted_rows_pages_are_free_at_once():
    host = Host()
    row = host.row(100, max_tokens=100)
    host.step()
    assert host.scheduler.pools[0].num_held == 7
    host.scheduler.release(row)
    assert host.scheduler.pools[0].num_held == 0
    assert (host.scheduler.tables[ALL_LAYERS] == -1).all()


@pytest.mark.parametrize("is_native", [True, False])
def test_a_row_waits_for_pages_that_those_before_it_hold_and_nobody_behind_it_starves_it(is_native):
    host = Host(num_pages=8, num_slots=4, is_native=is_native)
    host.add(60, max_tokens=30)
    big = host.row(100, max_tokens=10)
    small = [host.row(10, max_tokens=10) for _ in range(6)]
    host.finish()
    assert len(big.completion.token_ids) == 10
    assert all(row.is_finished for row in small)
