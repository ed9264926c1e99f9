"""Plans for accelerators by their own compilers."""
import pytest

from tpllm.bench.shapes import SHAPES
from tpllm.plan import PlanOptions, make_plan, plan_best

pytestmark = pytest.mark.aot


@pytest.mark.parametrize(("topology", "kind"), [("v5e:2x2", "TPU v5 lite"), ("h100:4", "NVIDIA H100 80GB HBM3")])
def test_seven_billion_parameters_on_four_devices(topology, kind):
    plan = make_plan(PlanOptions("mistral-7b", topology, num_seqs=16))
    memory, speed = plan["memory"], plan["speed"]
    assert plan["plan"]["device_kind"] == kind
    assert plan["plan"]["mesh"] == "tp=4"
    assert memory["fits"]
    assert memory["num_seqs_that_fit"] > 16
    assert memory["weight_bytes"] == pytest.approx(2 * 7.24e9 / 4, rel=0.01)
    assert memory["kv_bytes"] == 16 * 4096 * 2 * 32 * 2 * 128 * 2
    hidden = [one for one in plan["programs"]["decode"]["collectives"] if one["num_bytes"] >= 16 * 4096 * 2]
    assert sum(one["count"] for one in hidden) == 2 * SHAPES["mistral-7b"].num_layers + 1
    assert 0 < plan["programs"]["decode"]["exchange_s"] < speed["step_s"] < speed["ttft_s"]
    assert speed["tokens_per_s"] == 16 / speed["step_s"]


def test_what_the_compiler_refuses_is_planned_with_fewer_rows():
    plan = make_plan(PlanOptions("tinyllama-1.1b", "v5e:2x2", num_seqs=800, context_len=2048))
    assert not plan["memory"]["fits"]
    assert 0 < plan["compiled_num_seqs"] <= plan["memory"]["num_seqs_that_fit"] < 800


def test_weights_that_no_device_has_room_for_are_not_compiled():
    plan = make_plan(PlanOptions("llama-3.1-405b", "h200:2"))
    assert (plan["memory"]["fits"], plan["memory"]["num_seqs_that_fit"], plan["programs"]) == (False, 0, {})
    assert "weights and caches need" in plan["refusal"]


def test_the_best_mesh_of_a_slice_is_searched_for():
    plan = plan_best(PlanOptions("tinyllama-1.1b", "v5e:2x2", num_seqs=64, context_len=1024))
    assert {one["mesh"] for one in plan["candidates"]} == {"tp=4", "dp=2,tp=2", "dp=4"}
    speeds = [one["tokens_per_s"] for one in plan["candidates"]]
    assert speeds == sorted(speeds, reverse=True)
    assert plan["plan"]["mesh"] == plan["candidates"][0]["mesh"]
