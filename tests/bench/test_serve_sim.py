"""``tpllm bench serve-sim``: what users wait for, from the command line and against hand-made deliveries."""
import functools
import json

import pytest

from tests.bench.conftest import bench
from tpllm.bench.neighbours import measure_long_prompt, measure_shared_prefix
from tpllm.bench.serving import Served, Watch, inter_token, latencies, percentiles, serve
from tpllm.bench.shapes import llm_of_shape
from tpllm.bench.workload import Item, MixedLengths, make_workload
from tpllm.errors import ConfigError

SMALL = ["--shape", "tiny", "--mesh", "tp=1", "--dtype", "float32", "--max-num-seqs", "3", "--num-requests", "6", "--prompt-lens", "4", "20",
         "--output-lens", "2", "12", "--output-median", "6"]
LATENCIES = ("ttft_s", "inter_token_s", "delivery_gap_s", "end_to_end_s")


exit_code = functools.partial(bench, "serve-sim")


@pytest.fixture(scope="module")
def llm():
    with llm_of_shape("tiny", mesh="tp=1", dtype="float32", max_num_seqs=4, prefill_chunk_size=32) as llm:
        yield llm


def test_what_a_user_waits_for_is_taken_from_when_tokens_came():
    served = Served(10.0)
    for now, num_tokens in ((12.0, 1), (12.5, 1), (13.0, 3), (16.0, 7)):
        served.note(now, num_tokens)
    assert served.deliveries == [(12.0, 1), (13.0, 2), (16.0, 4)]
    assert (served.ttft, served.end_to_end, served.seconds_per_token) == (2.0, 6.0, 4 / 6)
    assert served.spans == [(12.0, 13.0, 2), (13.0, 16.0, 4)]
    assert inter_token(served.spans) == [0.5, 0.5, 0.75, 0.75, 0.75, 0.75]
    assert latencies([served])["delivery_gap_s"]["p50"] == 2.0
    assert Served(0.0, [(1.0, 1)]).seconds_per_token == 0.0


def test_percentiles_of_nothing_are_none():
    assert percentiles([]) == {"p50": None, "p90": None, "p99": None}
    assert percentiles([1.0] * 9) == {"p50": 1.0, "p90": 1.0, "p99": 1.0}


def test_requests_are_served_in_real_time_and_those_in_time_are_counted(llm):
    items = make_workload(512, MixedLengths(6, prompt_lens=(4, 20), output_lens=(2, 12), output_median=6.0, rate=100.0))
    found = serve(llm, items, ttft_limit=1e9, token_limit=1e9)
    assert found["seconds"] >= items[-1].arrival_s
    assert found["good_share"] == 1
    assert found["num_generated_tokens"] == sum(item.output_len for item in items)
    late = serve(llm, items, ttft_limit=1e-9, token_limit=1e9)
    assert late["good_share"] == late["goodput_requests_per_s"] == 0
    assert late["num_prefilled_tokens"] == found["num_prefilled_tokens"]  # nothing was left of the first time


def test_a_watched_request_gets_every_token_delivered(llm):
    watch = Watch(llm.engine)
    request = watch.add(Item([5, 6, 7], 9))
    watch.run_until(lambda: request.is_finished)
    assert sum(num for _, num in watch.of(request).deliveries) == 9


def test_a_long_prompt_is_measured_among_rows_that_go_on(llm):
    found = measure_long_prompt(llm, 200, num_runs=2)
    assert (found["prompt_len"], found["num_rows"], len(found["runs"])) == (200, 3, 2)
    assert {"ttft_s", "ttft_alone_s", "ttft_ratio", "inter_token_p99_ratio", "delivery_gap_p99_ratio"} <= set(found["medians"])
    for run in found["runs"]:
        assert min(run["num_spans"].values()) >= 3
        assert run["inter_token_p99_ratio"] == run["inter_token_disturbed_p99_s"] / run["inter_token_undisturbed_p99_s"]
    assert not llm.engine.has_work


def test_a_long_prompt_that_no_row_holds_is_refused(llm):
    with pytest.raises(ConfigError, match="--long-prompt is 511; a row holds 512, so give at most 510"):
        measure_long_prompt(llm, 511, num_runs=1)


def test_a_shared_prefix_saves_its_full_pages_for_all_but_the_first(llm):
    llm.reset_prefix_cache()
    found = measure_shared_prefix(llm, 300, num_requests=6, suffix_len=8, num_runs=2)
    shared = 300 // llm.shapes.shared_multiple * llm.shapes.shared_multiple
    assert found["num_prompt_tokens"] == 6 * 308
    assert found["num_prefilled_tokens"] == 308 + 5 * (308 - shared)
    assert found["prefill_work_saved"] == pytest.approx(5 * shared / (6 * 308))
    assert found["hit_rate"] > 0
    assert (len(found["ttft_misses_s"]), len(found["ttft_hits_s"])) == (2, 2)


def test_a_shape_gives_tables_json_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures are an extra")
    json_file, picture = tmp_path / "r.json", tmp_path / "r.svg"
    parts = ["--rate", "50", "200", "--long-prompt", "100", "--runs", "1"]
    assert exit_code(*SMALL, *parts, "--json", str(json_file), "--plot", str(picture)) == 0
    report = json.loads(json_file.read_text())
    assert set(report) == {"benchmark", "machine", "setup", "rates", "long_prompt", "shared_prefix", "load_average_after"}
    assert (report["setup"]["max_num_seqs"], report["setup"]["rate"], report["setup"]["max_model_len"]) == (3, [50, 200], 32)
    assert set(report["rates"]) == {"50", "200"}
    for entry in report["rates"].values():
        assert {"goodput_requests_per_s", "mean_waiting", "max_waiting", "slot_occupancy", "timeline", "host_share", *LATENCIES} <= set(entry)
        assert all(set(entry[name]) == {"p50", "p90", "p99"} for name in LATENCIES)
    assert report["long_prompt"]["num_rows"] == 3
    assert report["shared_prefix"] is None
    assert "<svg" in picture.read_text()
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("50 requests/s", "time to first token, p99", "goodput", "100 tokens among 3 rows", "r.svg"))


def test_a_part_alone_needs_no_arrivals(tmp_path, capsys):
    assert exit_code(*SMALL, "--shared-prefix", "64", "--runs", "1", "--json", str(tmp_path / "r.json")) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["rates"], report["long_prompt"]) == ({}, None)
    assert report["shared_prefix"]["num_requests"] == 6
    shown = capsys.readouterr().out
    assert "prefill work saved" in shown
    assert "requests/s" not in shown


@pytest.mark.parametrize(("words", "message"), [
    (["--rate", "0"], "0 is no number above 0"),
    (["--shared-prefix", "64", "--plot", "r.png"], "--plot draws arrivals; give --rate too"),
    (["--plot", "r.gif"], "--plot is r.gif; its name must end in one of"),
    (["--shared-prefix", "500"], "the longest row has 518 tokens, tiny has a context of 512"),
    (["--long-prompt", "511"], "--long-prompt is 511; a row holds 512"),
])
def test_what_cannot_be_measured_is_one_line_and_code_2(words, message, capsys):
    assert exit_code(*SMALL, *words) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("tpllm: error: ")
    assert message in line
