"""``tpllm bench throughput``: both kinds of batching do the same work, and every number of it is written down."""
import functools
import json
import sys

import pytest

from tests.bench.conftest import bench
from tpllm.bench.batching import MeasuredCosts, Timeline, check_done, run_continuous, run_static
from tpllm.bench.shapes import llm_of_shape
from tpllm.bench.throughput import gain_entry, medians
from tpllm.bench.workload import Item, MixedLengths, make_workload
from tpllm.errors import TpllmError

SMALL = ["--shape", "tiny", "--mesh", "tp=1", "--dtype", "float32", "--max-num-seqs", "3", "--num-requests", "7", "--prompt-lens", "4", "20",
         "--output-lens", "2", "12", "--output-median", "6"]
NUMBERS = {"seconds", "requests_per_s", "output_tokens_per_s", "total_tokens_per_s", "host_s", "waited_s", "num_programs", "num_decode_steps",
           "num_prefilled_tokens", "num_generated_tokens", "host_share", "waited_share", "host_ms_per_program", "slot_occupancy",
           "tokens_per_step_and_slot"}


exit_code = functools.partial(bench, "throughput")


@pytest.fixture(scope="module")
def llm():
    with llm_of_shape("tiny", mesh="tp=1", dtype="float32", max_model_len=32, max_num_seqs=3) as llm:
        yield llm


@pytest.fixture(scope="module")
def items():
    return make_workload(512, MixedLengths(7, prompt_lens=(4, 20), output_lens=(2, 12), output_median=6.0))


@pytest.mark.parametrize("take", [run_continuous, run_static])
def test_a_run_counts_every_token_once_and_a_second_run_finds_nothing_cached(llm, items, take):
    for _ in range(2):
        run = take(llm, items)
        assert run.counters["num_generated_tokens"] == run.num_output_tokens == sum(item.output_len for item in items)
        assert run.counters["num_prefilled_tokens"] == run.num_prompt_tokens == sum(len(item.prompt_token_ids) for item in items)
        assert set(run.numbers()) == NUMBERS
        assert 0 < run.numbers()["slot_occupancy"] <= 1
        assert max(run.timeline.busy) <= 3


def test_static_batching_never_runs_more_than_one_batch(llm, items, monkeypatch):
    engine, waiting = llm.engine, []
    add_request = engine.add_request
    monkeypatch.setattr(engine, "add_request", lambda request_id, *rest: waiting.append((int(request_id), engine.scheduler.running))
                        or add_request(request_id, *rest))
    run = run_static(llm, items)
    assert [(number, running) for number, running in waiting if number % 3 == 0] == [(0, []), (3, []), (6, [])]
    assert (run.timeline.waiting[0], run.timeline.waiting[-1]) == (7, 0)
    assert [count for count in dict.fromkeys(run.timeline.waiting) if count in (7, 4, 1, 0)] == [7, 4, 1, 0]


def test_a_request_that_ended_early_is_no_result(llm):
    item = Item([1, 2, 3], 5)
    request = llm.engine.add_request("9", item.prepared(llm.engine))
    llm.engine.abort(request)
    with pytest.raises(TpllmError, match="request 9 gave 0 of 5 tokens: abort"):
        check_done(item, request)


def test_means_over_time_weigh_each_state_by_how_long_it_held():
    timeline = Timeline()
    for now, busy, waiting in ((0.0, 0, 5), (1.0, 4, 1), (2.0, 4, 1), (3.0, 4, 0), (4.0, 2, 0)):
        timeline.add(now, busy, waiting)
    timeline.end(8.0)
    assert timeline.as_lists() == {"times_s": [0.0, 1.0, 3.0, 4.0, 8.0], "busy": [0, 4, 4, 2, 0], "waiting": [5, 1, 0, 0, 0]}
    assert timeline.when_queue_emptied() == 3.0
    assert timeline.mean("busy", until=3.0) == (1 * 0 + 2 * 4) / 3
    assert timeline.mean("busy") == (2 * 4 + 1 * 4 + 4 * 2) / 8
    assert timeline.mean("waiting") == (5 + 2) / 8


def test_the_gain_is_compared_with_the_replay_at_the_measured_costs():
    items = [Item([1] * 10, output_len) for output_len in (3, 6, 2, 4, 3)]
    results = {"static": {"seconds": 6.0}, "continuous": {"seconds": 4.0}}
    entry = gain_entry(items, MeasuredCosts(0.02, [0.5, 0.5]), results, num_slots=2)
    assert entry["replayed_seconds"] == {"continuous": 4.5, "static": 6.0}
    assert (entry["measured"], entry["allowed"], entry["steps_alone_allow"]) == (1.5, 6 / 4.5, 10 / 7)
    assert entry["share_of_allowed"] == 1.5 / (6 / 4.5)
    assert entry["share_of_allowed_increase"] == pytest.approx(1.5)
    unknown = gain_entry(items, None, results, num_slots=2)
    assert (unknown["measured"], unknown["allowed"], unknown["costs"]) == (1.5, None, None)
    assert set(unknown) == set(entry)


def test_medians_are_of_each_number_where_every_run_has_it():
    assert medians([{"a": 1, "b": None}, {"a": 3, "b": 2}, {"a": 2, "b": 2}]) == {"a": 2, "b": None}


def test_a_shape_gives_a_table_json_and_a_picture(tmp_path, capsys):
    json_file, picture = tmp_path / "r.json", tmp_path / "r.png"
    pytest.importorskip("matplotlib", reason="pictures are an extra")
    assert exit_code(*SMALL, "--runs", "2", "--json", str(json_file), "--plot", str(picture)) == 0
    report = json.loads(json_file.read_text())
    assert set(report) == {"benchmark", "machine", "setup", "results", "gain", "runs", "timelines", "load_average_after"}
    assert {"model", "mesh", "dtype", "quantization", "kernels", "kv_cache_dtype", "max_num_seqs", "max_model_len", "page_size", "num_requests",
            "seed", "prompt_lens", "output_lens", "output_median", "output_sigma", "num_runs"} <= set(report["setup"])
    assert (report["setup"]["max_num_seqs"], report["setup"]["max_model_len"], report["setup"]["prompt_lens"]) == (3, 32, [4, 20])
    for kind in ("continuous", "static"):
        assert set(report["results"][kind]) == NUMBERS
        assert len(report["runs"][kind]) == 2
        assert len(report["timelines"][kind]["times_s"]) == len(report["timelines"][kind]["busy"]) > 1
    assert {"measured", "allowed", "share_of_allowed", "share_of_allowed_increase", "steps_alone_allow", "costs"} <= set(report["gain"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("tiny (random weights), float32, mesh tp=1 (cpu), 3 slots", "output tokens/s", "slots busy", "host at work",
                                          "continuous batching is", "r.png"))


@pytest.mark.parametrize(("words", "message"), [
    (["--num-requests", "0"], "0 is no whole number of at least 1"),
    (["--prompt-lens", "9", "8"], "prompt_lens are 9 to 8"),
    (["--output-median", "-1"], "-1 is no number above 0"),
    (["--output-sigma", "much"], "much is no number above 0"),
    (["--output-lens", "8", "500"], "the longest row has 520 tokens, tiny has a context of 512; ask for shorter prompts or outputs"),
    (["--json", "none/r.json"], "cannot write none/r.json"),
    (["--plot", "none/r.png"], "cannot write none/r.png"),
    (["--plot", "r.txt"], "--plot is r.txt; its name must end in one of .png, .svg, .pdf"),
    (["--model", "demo"], "not allowed with argument"),
])
def test_what_cannot_be_measured_is_one_line_and_code_2(words, message, capsys):
    assert exit_code(*SMALL, *words) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("tpllm: error: ")
    assert message in line


def test_a_picture_without_matplotlib_is_refused_first_with_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert exit_code(*SMALL, "--plot", str(tmp_path / "r.png")) == 2
    assert "--plot needs matplotlib, which is not installed; use: pip install 'tpllm[plot]'" in capsys.readouterr().err
