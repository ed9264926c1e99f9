"""A plan for this machine's CPU devices beside what an engine then allocates and compiles."""
import collections
import dataclasses
import json
import re

import jax
import pytest

from tests.engine.conftest import lowered_decode
from tpllm import LLM
from tpllm.aot import hlo
from tpllm.bench.shapes import SHAPES, llm_of_shape
from tpllm.checkpoint.source import DEMO_FOLDER
from tpllm.cli.main import main
from tpllm.errors import ConfigError, TpllmError
from tpllm.plan import PlanOptions, find_meshes, make_plan, plan_best
from tpllm.plan.picture import html_page
from tpllm.plan.table import grouped, memory_parts

OPTIONS = PlanOptions("tiny", "cpu:8", mesh="dp=2,tp=2", num_seqs=4, context_len=128)
CASES = [{}, {"mesh": "tp=2"}, {"mesh": "tp=1", "quantization": "int4"}, {"mesh": "tp=2", "quantization": "int8", "kv_cache_dtype": "int8"}]


def bytes_on(device: jax.Device, tree) -> int:
    return sum(shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards if shard.device == device)


@pytest.fixture(scope="module")
def plan():
    return make_plan(OPTIONS)


@pytest.mark.parametrize("changes", CASES, ids=lambda changes: ",".join(map(str, changes.values())) or "default")
def test_planned_bytes_are_what_an_engine_allocates(changes, plan):
    options = dataclasses.replace(OPTIONS, **changes)
    memory = (make_plan(options) if changes else plan)["memory"]
    with llm_of_shape("tiny", mesh=options.mesh, quantization=options.quantization, kv_cache_dtype=options.kv_cache_dtype, max_num_seqs=4,
                      max_model_len=128) as llm:
        device = llm.config.partition.mesh.devices.flat[0]
        assert memory["weight_bytes"] == pytest.approx(bytes_on(device, llm.params), rel=0.05)
        assert memory["kv_bytes"] == pytest.approx(bytes_on(device, llm._engine.runner.executor.cache), rel=0.05)
        assert memory["slot_bytes"] == pytest.approx(bytes_on(device, llm._engine.runner.executor.state), rel=0.05)
    assert memory["fits"]
    assert memory["temporary_bytes"] > 0


def test_planned_collectives_are_those_of_the_engines_own_step(plan):
    with llm_of_shape("tiny", mesh=OPTIONS.mesh, max_num_seqs=4, max_model_len=128) as llm:
        found = hlo.collectives(hlo.read_instructions(lowered_decode(llm).compile().as_text()))
    planned = collections.Counter()
    for one in plan["programs"]["decode"]["collectives"]:
        planned[one["op"]] += one["count"]
    assert planned == collections.Counter(instruction.op for instruction in found)
    hidden = [one for one in plan["programs"]["decode"]["collectives"] if one["results"] == "f32[2,1,128]"]
    assert sum(one["count"] for one in hidden) >= 2 * SHAPES["tiny"].num_layers + 1
    assert {one["group_size"] for one in hidden} == {2}


def test_times_are_not_made_up_for_devices_whose_speeds_are_not_known(plan):
    assert plan["speed"]["step_s"] is plan["speed"]["tokens_per_s"] is plan["speed"]["ttft_s"] is None
    assert plan["programs"]["decode"]["exchange_s"] is None
    assert plan["speed"]["decode"]["flops"] > 0


def test_what_does_not_fit_is_said_and_the_rows_that_do(monkeypatch, plan):
    roomy = plan["memory"]
    room = roomy["weight_bytes"] + roomy["temporary_bytes"] + int(1.5 * (roomy["kv_bytes_per_row"] + roomy["slot_bytes"] // 2))
    monkeypatch.setattr("tpllm.plan.planner.device_bytes", lambda _: room)
    plan = make_plan(OPTIONS)
    assert not plan["memory"]["fits"]
    assert re.search(r"(decode|prefill) needs [\d.]+ [kM]B of each device, programs can have [\d.]+ [kM]B of it", plan["refusal"])
    assert plan["memory"]["num_seqs_that_fit"] == plan["compiled_num_seqs"] == 2
    monkeypatch.setattr("tpllm.plan.planner.device_bytes", lambda _: roomy["weight_bytes"] // 2)
    plan = make_plan(OPTIONS)
    assert (plan["memory"]["num_seqs_that_fit"], plan["programs"], plan["speed"]) == (0, {}, {})
    assert memory_parts(plan)["free"] < 0
    assert "does NOT fit, not with a single row either" in html_page(plan)


def test_a_folder_needs_only_its_config_and_a_whole_one_keeps_its_formats(tmp_path):
    (tmp_path / "config.json").write_text((DEMO_FOLDER / "config.json").read_text())
    options = dataclasses.replace(OPTIONS, model=str(tmp_path))
    bare, whole = make_plan(options), make_plan(dataclasses.replace(options, model="demo"))
    assert bare["memory"] == whole["memory"]
    with LLM("demo", mesh=OPTIONS.mesh, max_num_seqs=4, max_model_len=128) as llm:
        assert bare["memory"]["weight_bytes"] == pytest.approx(bytes_on(jax.devices()[0], llm.params), rel=0.05)


def test_the_search_tries_every_mesh_that_cuts_model_and_rows():
    meshes = {candidate.mesh for candidate in find_meshes(dataclasses.replace(OPTIONS, num_seqs=8))}
    assert meshes == {"tp=8", "dp=2,tp=4", "dp=4,tp=2", "dp=8"} - {"tp=8"}  # four heads
    best = plan_best(dataclasses.replace(OPTIONS, num_seqs=8))
    assert best["plan"]["mesh"] == best["candidates"][0]["mesh"]
    assert best["memory"]["fits"]
    with pytest.raises(ConfigError, match="no mesh over 8 devices cuts tiny and 3 rows evenly"):
        find_meshes(dataclasses.replace(OPTIONS, num_seqs=3))


def test_an_expert_model_is_also_cut_by_experts():
    config = dataclasses.replace(SHAPES["tiny"], num_experts=4, num_experts_per_token=2, expert_size=64, sparse_layers=(True, True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "sparse", config)
        meshes = {candidate.mesh for candidate in find_meshes(dataclasses.replace(OPTIONS, model="sparse", num_seqs=8))}
    assert {"dp=2,ep=2,tp=2", "ep=2,tp=4", "dp=2,tp=4"} <= meshes


def test_few_bytes_are_one_line_and_nothing_is_lost(plan):
    for program in plan["programs"].values():
        rows = grouped(program["collectives"])
        assert sum(row["num_bytes"] for row in rows) == program["exchanged_bytes"]
        assert sum(row["count"] for row in rows) == sum(one["count"] for one in program["collectives"])
        assert len([row for row in rows if row["op"] == "small ones"]) <= 2


def test_the_page_holds_everything_and_loads_nothing(plan):
    page = html_page(plan)
    assert page.count("<rect") >= 5 + 2 * 4
    assert all(text in page for text in ("tiny on cpu:8", "2 data groups of 2 devices", "all-reduce", "keys and values"))
    assert "http" not in page
    assert "src=" not in page


def test_the_command_prints_a_table_or_json_and_writes_files(tmp_path, capsys):
    words = ["plan", "--model", "tiny", "--topology", "cpu:2", "--num-seqs", "2", "--context", "64"]
    assert main([*words, "--json", str(tmp_path / "plan.json"), "--html", str(tmp_path / "plan.html")]) == 0
    printed = capsys.readouterr().out
    assert "tiny on cpu:2" in printed
    assert "it fits; about" in printed
    assert json.loads((tmp_path / "plan.json").read_text())["memory"]["fits"]
    assert (tmp_path / "plan.html").read_text().startswith("<!doctype html>")
    assert main([*words, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["mesh"] == "tp=2"


@pytest.mark.parametrize(("changes", "message"), [
    ({"topology": "a100:8"}, "unknown accelerator 'a100'"), ({"model": "llama-9b"}, "there is no such folder"),
    ({"context_len": 1024}, "max_model_len is 1024; the model's context is 512"), ({"num_seqs": 0}, "max_num_seqs is 0"),
    ({"num_seqs": 3}, "max_num_seqs 3 is no multiple of the mesh's dp size 2"), ({"prompt_len": 128}, "prompt_len is 128; it must be at least 1"),
    ({"mesh": "tp=16"}, "needs 16 devices but 8"), ({"mesh": "xp=2"}, "unknown axis 'xp'"), ({"prefill_chunk": 100}, "prefill_chunk_size is 100"),
    ({"quantization": "int3"}, "int3"), ({"kv_cache_dtype": "int4"}, "kv_cache_dtype is 'int4'")])
def test_bad_input_is_named(changes, message):
    with pytest.raises((TpllmError, ValueError), match=message):
        make_plan(dataclasses.replace(OPTIONS, **changes))
