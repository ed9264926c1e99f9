"""The GPU benchmark: it runs to its end with tiny shapes on a CPU, and whatever fails in it, the rest goes on."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import command, contests
from benchmarks.gpu.bars import find_bars
from benchmarks.gpu.contests import Contest, Entrant, Pace, run_contest
from benchmarks.gpu.jax_sides import SIDES
from benchmarks.gpu.jax_worker import relative_error
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.session import OutOfTimeError, Section, Session
from benchmarks.gpu.weights import device_params
from benchmarks.gpu.worker import TaskError, Worker
from pallas_kernels.tiling import Device
from sharding_rules import DATA_TENSOR, make_mesh
from tests.pallas_kernels import quick_interpreter
from tpllm.bench.shapes import find_shape
from tpllm.model.params import abstract_params
from tpllm.model.partition import fit_to_mesh
from tpllm.weights.policy import parse_policy
from tpllm.weights.storage import Storage

NAMES = [section.name for section in SECTIONS]
QUICK = Pace(1, 1, 0.0005)


@pytest.fixture
def worker():
    worker = Worker("test", {"JAX_PLATFORMS": "cpu"})
    yield worker
    worker.stop()


@pytest.fixture
def session():
    session = Session(is_tiny=True, seconds=60, path=None)
    yield session
    session.close()


def report_of(tmp_path, *words: str) -> tuple[int, dict]:
    path = tmp_path / "gpu.json"
    code = command.main(["--tiny", "--out", str(path), *words])
    return code, json.loads(path.read_text())


def test_a_section_alone_is_measured_and_every_other_is_listed_as_not_run(tmp_path, capsys):
    code, report = report_of(tmp_path, "--only", "ceilings")
    assert code == 0
    assert set(report["sections"]) == set(NAMES)
    assert [name for name in NAMES if report["sections"][name]["status"] != "not run"] == ["ceilings"]
    assert set(report["sections"]["ceilings"]["best"]) == {"copy", "bfloat16", "float8_e4m3fn", "int8"}
    assert all(value > 0 for value in report["sections"]["ceilings"]["best"].values())
    assert {"date", "jax", "device_kind", "load_average", "nvidia_smi"} <= set(report["machine"])
    assert report["setup"]["packages"]["jax"] == report["machine"]["jax"]
    assert all(bar["value"] is None and bar["is_reached"] is None for bar in report["bars"])
    shown = capsys.readouterr().out
    assert "products: not run" in shown
    assert "not measured" in shown


@pytest.mark.slow
def test_all_of_it_runs_with_tiny_shapes_and_peers_that_need_cuda_are_absent(tmp_path, capsys):
    code, report = report_of(tmp_path)
    assert code == 0
    assert {name: report["sections"][name].get("error") for name in NAMES} == dict.fromkeys(NAMES)
    assert all(report["sections"][name]["entries"] for name in NAMES if name not in ("ceilings", "transformers"))
    cases = report["sections"]["correctness"]["entries"]
    assert {case["op"] for case in cases if case["is_right"]} == {"flash_attention", "paged_attention", "quant_matmul", "gated_mlp", "rms_norm"}
    assert all(case["is_right"] or case["refused"] for case in cases)
    for name in contests.CONTESTS:
        sides = [side for contest in report["sections"][name]["entries"] for side in contest["sides"].values()]
        assert "needs a GPU with CUDA" in {side.get("absent") for side in sides}
        assert not [side["error"] for side in sides if "error" in side]
        assert all(side["seconds"] > 0 and side["is_right"] for side in sides if side.get("is_ours"))
    models = report["sections"]["end_to_end"]["entries"]
    assert [model["quantization"] for model in models] == [None, "int8", "int4", "fp8"]
    assert all(row["bytes_per_s"] > 0 for model in models for row in model["decode"] if row["step_s"])
    assert "of the ceiling" in capsys.readouterr().out


MOSAIC, TRITON = {"implementation": "mosaic_gpu", "interpret": True}, {"implementation": "triton", "interpret": True}
PROMPT, PAGES = {"B": 1, "T": 128, "N": 2, "K": 1, "H": 64}, {"B": 2, "S": 128, "page": 64, "N": 2, "K": 1, "H": 128}
FEW_ROWS, SQUARE = {"M": 8, "N": 128, "K": 256}, {"M": 128, "N": 128, "K": 128}
SMALL_SIDES = [
    ("flash_ours", PROMPT | MOSAIC), ("paged_ours", PAGES | MOSAIC), ("paged_ours", PAGES | MOSAIC | {"cache_dtype": "int8"}),
    *(("packed_ours", FEW_ROWS | MOSAIC | {"name": name}) for name in ("int8", "int4", "q4_k", "fp8", "fp8-a8")),
    ("packed_ours", FEW_ROWS | TRITON | {"name": "int4"}),
    *(("eight_bit_ours", SQUARE | {"name": name, "interpret": True}) for name in ("fp8-a8", "fp8-g128-a8", "w8a8")),
    *(("norm_ours", {"M": 8, "D": 256} | how) for how in (MOSAIC, TRITON)), ("mlp_ours", {"M": 8, "D": 128, "F": 128} | MOSAIC),
    ("mlp_packed_ours", {"M": 8, "D": 256, "F": 256, "name": "int8"} | MOSAIC),
]


@pytest.mark.slow
@pytest.mark.parametrize(("side", "sizes"), SMALL_SIDES, ids=str)
def test_a_kernel_gives_what_its_contest_expects_of_it(side, sizes, monkeypatch):
    quick_interpreter.install(monkeypatch)
    found = SIDES[side](**sizes)
    inputs = found.inputs(jax.random.key(0))
    assert relative_error(found.call(*inputs), found.expected(*inputs)) < contests.LARGEST_ERROR


def test_a_wrong_result_is_told_by_the_exit_code(tmp_path, monkeypatch, capsys):
    def run(session, section):
        section["entries"] = [{"op": "rms_norm", "implementation": "mosaic_gpu", "case": "Case", "is_right": False, "errors": [0.5], "bound": 0.01}]
    monkeypatch.setattr(command, "SECTIONS", (Section("correctness", run, 0),))
    monkeypatch.setattr(command, "begin", lambda session, names: None)
    code, _ = report_of(tmp_path, "--only", "correctness")
    assert code == 1
    assert "WRONG rms_norm mosaic_gpu Case: errors [0.5], at most 0.01" in capsys.readouterr().out


def test_a_section_that_fails_is_written_down_and_the_rest_goes_on(session):
    def fail(session, section):
        raise ValueError("no luck")

    def end_early(session, section):
        section["entries"] = [1]
        raise OutOfTimeError
    session.run([Section("a", fail, 0), Section("b", end_early, 0), Section("c", lambda session, section: None, 0)])
    sections = session.report["sections"]
    assert (sections["a"]["status"], sections["a"]["error"]) == ("failed", "ValueError: no luck")
    assert (sections["b"]["status"], sections["b"]["not_run"]) == ("partly", ["the rest: the budget of time was used up"])
    assert sections["c"]["status"] == "done"


def test_what_the_budget_leaves_no_time_for_is_listed(tmp_path):
    _, report = report_of(tmp_path, "--minutes", "0.001", "--only", "fused", "flash_attention")
    assert report["sections"]["fused"]["not_run"] == ["rms_norm 8 x 256", "gated_mlp 8 x 128 x 256"]
    assert report["sections"]["fused"]["status"] == "not run"


def test_later_sections_keep_what_is_reserved_for_them(session):
    left = []
    session.run([Section(name, lambda session, section: left.append(session.left_s), reserve_s) for name, reserve_s in (("a", 0), ("b", 270))])
    assert left == pytest.approx([30, 60], abs=1)  # of a minute, which is a ninth of what reserves are for


def test_a_worker_gives_results_and_errors_and_lives_on(worker):
    assert worker.call("json:loads", s='{"a": [1]}', timeout_s=60) == {"a": [1]}
    with pytest.raises(TaskError, match="JSONDecodeError: Expecting") as caught:
        worker.call("json:loads", s="{", timeout_s=60)
    assert "Traceback" in caught.value.details
    assert worker.call("json:dumps", obj="b" * 2**20, timeout_s=60) == f'"{"b" * 2**20}"'
    assert worker.generation == 1


def test_a_worker_that_hangs_or_dies_or_loses_its_device_is_replaced(worker):
    with pytest.raises(TaskError, match="subprocess:run took more than 2 s; its process was ended"):
        worker.call("subprocess:run", args=["sleep", "600"], timeout_s=2)
    with pytest.raises(TaskError, match="the process of os:_exit ended with code 3"):
        worker.call("os:_exit", status=3, timeout_s=60)
    with pytest.raises(TaskError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        worker.call("importlib:import_module", name="CUDA_ERROR_ILLEGAL_ADDRESS", timeout_s=60)
    assert worker.call("json:loads", s="1", timeout_s=60) == 1
    assert worker.generation == 4


def test_a_side_is_prepared_again_where_another_one_ended_its_process(worker, monkeypatch):
    entrants = [Entrant("XLA", "norm_xla", needs_gpu=False), Entrant("unknown", "nobody", needs_gpu=False), Entrant("on a GPU", "flash_jax")]
    contest, call, ended = Contest("norm", {"M": 2, "D": 128}, entrants, flops=1), worker.call, []

    def call_and_end_once(task, **arguments):
        result = call(task, **arguments)
        if task.endswith(":prepare") and not ended:
            ended.append(worker.stop())
        return result
    monkeypatch.setattr(worker, "call", call_and_end_once)
    sides = run_contest(contest, {"jax": worker}, QUICK, is_tiny=True)["sides"]
    assert worker.generation == 2
    assert sides["XLA"]["seconds"] > 0
    assert sides["XLA"]["bytes_per_s"] == sides["XLA"]["num_bytes"] / sides["XLA"]["seconds"]
    assert sides["unknown"]["error"] == "KeyError: 'nobody'"
    assert sides["on a GPU"] == {"absent": "needs a GPU with CUDA"}


@pytest.mark.parametrize(("quantization", "device"), [("int4", Device("gpu", "NVIDIA H200", (9, 0))), ("fp8", None)], ids=["packed", "plain"])
def test_random_weights_are_finite_however_they_are_kept(quantization, device):
    config = fit_to_mesh(find_shape("tiny"), make_mesh({"tp": 1}, jax.devices()[:1]), DATA_TENSOR)
    storage = Storage(np.dtype(jnp.bfloat16), parse_policy(quantization), device=device)
    params, expected = device_params(config, storage), abstract_params(config, storage.dtype, storage)
    for leaf, abstract in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (abstract.shape, abstract.dtype, abstract.sharding)
        assert jnp.isfinite(leaf.astype(jnp.float32)).all()


def test_bars_are_judged_by_the_figures_they_are_about():
    def side(seconds, num_bytes=1.0):
        return {"seconds": seconds, "bytes_per_s": num_bytes / seconds}
    sections = {
        "ceilings": {"best": {"copy": 4e12}},
        "flash_attention": {"entries": [{"name": "causal 8192", "sides": {
            "ours": side(1.0), "torch SDPA, flash": side(1.2), "jax.nn, cuDNN": side(0.9), "JAX's Mosaic kernel": side(0.5),
            "torch SDPA, cuDNN": {"error": "no"}}}]},
        "paged_attention": {"entries": [{"name": "64 rows of 4096", "sides": {"ours": side(1.0, 3.6e12)}}]},
        "products": {"entries": [
            {"name": "8 rows", "sides": {"bf16, XLA": side(2.0), "bf16, torch": side(1.8), "int8, ours": side(1.0), "int8, XLA": side(9.0)}},
            {"name": "4096^3", "sides": {"bf16, torch": side(1.5), "fp8, ours": side(1.0), "fp8, XLA": side(0.1)}}]},
        "end_to_end": {"entries": [{"quantization": None, "decode": [{"batch_size": 1, "bytes_per_s": 3.6e12}]},
                                   {"quantization": "int8", "decode": [{"batch_size": 1, "error": "no"}]}]},
        "plan": {"entries": [{"error_of_tokens_per_s": 0.1}, {"error_of_tokens_per_s": -0.3}, {"error_of_tokens_per_s": None}]}}
    bars = {bar.what: (bar.value, bar.is_reached) for bar in find_bars({"sections": sections})}
    assert bars == {
        "decode bfloat16, 1 row: share of the copy bandwidth": (0.9, True), "decode int8, 1 row: share of the copy bandwidth": (None, None),
        "decode int4, 1 row: share of the copy bandwidth": (None, None),
        "flash attention causal 8192: speed over the best of cuDNN and torch SDPA": (0.9, False),
        "paged decode 64 rows of 4096: share of the copy bandwidth": (0.9, True), "int8 weights 8 rows: speed over bfloat16's best": (1.8, True),
        "fp8 product 4096^3: speed over bfloat16's best": (1.5, False), "tpllm plan's tokens/s: largest error beside the measured": (0.3, False)}


def test_a_result_that_could_not_be_written_is_refused(capsys):
    assert command.main(["--tiny", "--out", "none/x.json"]) == 2
    assert "cannot write none/x.json" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--only", "nothing"], ["--minutes", "0"]])
def test_an_option_that_cannot_be_is_refused(words):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--tiny", *words])
