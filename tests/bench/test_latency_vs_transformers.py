"""The benchmark beside transformers: two models of the same sizes, every pair and its medians written down."""
import importlib.util
import json
import pathlib

import pytest

from tpllm.bench import bandwidth
from tpllm.bench.bandwidth import Bandwidth
from tpllm.bench.shapes import SHAPES
from tpllm.bench.timing import RunTimes, Speeds, Workload
from tpllm.bench.traffic import Traffic

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "latency_vs_transformers.py"
TRAFFIC = Traffic(weight_bytes=10**6, weight_bytes_read=800, kv_bytes_valid=200, batch_size=1)
pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("latency_vs_transformers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_peer_has_as_many_weights_and_gives_every_token(script, monkeypatch):
    peer = script.make_peer(SHAPES["tiny"], context=160)
    table, layer = 512 * 128, 128 * (128 + 64 + 64 + 128) + 3 * 128 * 256 + 2 * 128
    assert sum(weight.numel() for weight in peer.parameters()) == 2 * table + 2 * layer + 128
    lengths = []
    forward = peer.forward
    monkeypatch.setattr(peer, "forward", lambda ids, **options: lengths.append(ids.shape[1]) or forward(ids, **options))
    script.time_peer(peer, 20, 6)
    assert lengths == [20, 1, 1, 1, 1, 1]


def test_pairs_are_compared_one_by_one_and_their_medians_taken(script):
    ours = [Speeds(ttft_s=1.0, prefill_tokens_per_s=prefill, step_s=1 / decode, decode_tokens_per_s=decode)
            for prefill, decode in ((100.0, 8.0), (50.0, 4.0), (90.0, 16.0))]
    theirs = [script.Turn(prefill=50.0, decode=4.0), script.Turn(prefill=100.0, decode=1.0), script.Turn(prefill=45.0, decode=16.0)]
    bandwidths = [Bandwidth((8000.0,)), Bandwidth((16000.0,)), Bandwidth((16000.0,)), Bandwidth((32000.0,))]
    result = script.summarize(ours, theirs, TRAFFIC, bandwidths)
    assert [pair["prefill_ratio"] for pair in result["pairs"]] == [2.0, 0.5, 2.0]
    assert [pair["decode_ratio"] for pair in result["pairs"]] == [2.0, 4.0, 1.0]
    assert [pair["decode_bytes_per_s"] for pair in result["pairs"]] == [8000.0, 4000.0, 16000.0]
    assert [pair["share_of_best_bandwidth"] for pair in result["pairs"]] == [0.5, 0.25, 0.5]
    assert [pair["share_of_median_bandwidth"] for pair in result["pairs"]] == [8 / 12, 4 / 16, 16 / 24]
    assert result["medians"]["decode_ratio"] == 2.0
    assert result["medians"]["peer_decode_tokens_per_s"] == 4.0
    assert result["medians"]["share_of_median_bandwidth"] == 8 / 12


def test_a_pair_whose_decode_was_too_short_is_no_result(script):
    speeds = Speeds(ttft_s=1.0, prefill_tokens_per_s=1.0, step_s=None, decode_tokens_per_s=None)
    with pytest.raises(ValueError, match="raise --output-len"):
        script.summarize([speeds], [script.Turn(prefill=1.0, decode=1.0)], TRAFFIC, [Bandwidth((1.0,))] * 2)


def test_the_dated_file_holds_the_setup_the_machine_and_every_pair(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 2**22)
    real_run = Workload.time_run
    # Decoding so small a model takes less than the clock's noise on a busy machine: a second is added to it.
    monkeypatch.setattr(Workload, "time_run", lambda self, llm: (lambda run: RunTimes(run.short, run.long + 1.0, run.ttft))(real_run(self, llm)))
    words = ["--shape", "tiny", "--prompt-len", "20", "--output-len", "5", "--pairs", "2", "--warmup", "0", "--results", str(tmp_path)]
    assert script.main(words) == 0
    path, = tmp_path.glob("20??-??-??-latency-tiny-float32.json")
    report = json.loads(path.read_text())
    assert len(report["pairs"]) == 2
    assert set(report["medians"]) == set(report["pairs"][0])
    assert {"torch", "transformers", "cpu_model", "load_average", "date"} <= set(report["machine"])
    assert report["setup"]["peer_attention"] == "sdpa"
    assert len(report["bandwidth"]["samples_bytes_per_s"]) == 3 * bandwidth.NUM_PASSES
    table = capsys.readouterr().out
    assert all(text in table for text in ("prefill, tokens/s", "decode, tokens/s", "transformers", "ratio", str(path.name)))
