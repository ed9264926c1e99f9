"""The scheduler: host integers only."""
from tpllm import SamplingParams
from tpllm.engine.request import new_request
from tpllm.engine.scheduler import MAX_PREFILLS_IN_A_ROW, DecodePlan, PrefillPlan, Scheduler


def sequence(prompt_len: int, max_tokens: int = 8):
    request = new_request("0", None, list(range(prompt_len)), params=SamplingParams(max_tokens=max_tokens), seed=0, max_model_len=1000,
                          tokenizer=None)
    return request.sequences[0]


def scheduler(num_slots: int = 4, num_groups: int = 1) -> Scheduler:
    return Scheduler(num_slots, num_groups, (16, 32, 64))


def test_a_prompt_is_cut_at_multiples_of_the_largest_bucket_and_its_rest_takes_the_smallest_that_holds_it():
    plans, row = scheduler(), sequence(150)
    plans.add(row)
    cuts = []
    while isinstance(plan := plans.plan(8), PrefillPlan):
        cuts.append((plan.rows[0][1], plan.bucket))
    assert cuts == [(0, 64), (64, 64), (128, 32)]
    assert isinstance(plan, DecodePlan)


def test_decoding_rows_get_a_step_after_a_few_chunks_and_only_one_while_prompts_wait():
    plans, first = scheduler(), sequence(4, max_tokens=100)
    plans.add(first)
    plans.plan(8)
    plans.add(sequence(64 * 10))
    kinds = [plans.plan(8) for _ in range(MAX_PREFILLS_IN_A_ROW + 1)]
    assert [isinstance(plan, PrefillPlan) for plan in kinds].count(True) == MAX_PREFILLS_IN_A_ROW
    decode = next(plan for plan in kinds if isinstance(plan, DecodePlan))
    assert decode.num_steps == 1
    assert [row for _, row in decode.owners] == [first]


def test_no_more_steps_are_dispatched_than_a_row_may_still_get():
    plans, row = scheduler(), sequence(4, max_tokens=6)
    plans.add(row)
    plans.plan(8)
    assert [plans.plan(4).num_steps, plans.plan(4).num_steps] == [4, 1]
    assert plans.plan(4) is None
    assert plans.has_work


def test_a_freed_slot_goes_to_the_row_that_waited_longest():
    plans, rows = scheduler(num_slots=2), [sequence(4) for _ in range(4)]
    for row in rows:
        plans.add(row)
    plans.plan(8)
    assert plans.slots == rows[:2]
    plans.release(rows[0])
    plans.plan(8)
    assert plans.slots == [rows[2], rows[1]]
    plans.release(rows[3])
    assert not plans.waiting


def test_each_data_group_prefills_a_row_of_its_own_where_the_lengths_agree():
    plans = scheduler(num_slots=4, num_groups=2)
    for length in (5, 6, 7, 40):
        plans.add(sequence(length))
    plan = plans.plan(8)
    assert [(row.slot, start) for row, start in plan.rows] == [(0, 0), (2, 0)]
    assert [row.slot for row, _ in plans.plan(8).rows] == [1]
    assert [(row.slot, plan.bucket) for plan in [plans.plan(8)] for row, _ in plan.rows] == [(3, 64)]
