"""The benchmark beside transformers: two models of the same sizes do the same work, and everything measured is written down."""
import json

import pytest

from tests.bench.conftest import load_script
from tpllm.bench import bandwidth
from tpllm.bench.shapes import SHAPES
from tpllm.bench.timing import RunTimes, Workload

SMALL = ["--shape", "tiny", "--prompt-len", "20", "--output-len", "5", "--rounds", "2", "--max-repeats", "1"]
pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def script():
    return load_script("benchmarks.cpu.vs_transformers", torch="torch", transformers="transformers")


@pytest.fixture(scope="module")
def peer(script):
    return script.make_peer(SHAPES["tiny"], dtype="bfloat16", context=160)


def test_the_peer_has_as_many_weights_of_the_same_dtype_and_sdpa_attention(peer):
    table, layer = 512 * 128, 128 * (128 + 64 + 64 + 128) + 3 * 128 * 256 + 2 * 128
    assert sum(weight.numel() for weight in peer.parameters()) == 2 * table + 2 * layer + 128
    assert {str(weight.dtype) for weight in peer.parameters()} == {"torch.bfloat16"}
    assert peer.config._attn_implementation == "sdpa"
    assert not peer.training


def test_the_peers_row_is_a_prefill_and_a_call_a_token(script, peer, monkeypatch):
    lengths, forward = [], peer.forward
    monkeypatch.setattr(peer, "forward", lambda ids, **options: lengths.append(ids.shape[1]) or forward(ids, **options))
    speeds = script.time_peer_row(peer, 20, 6)
    assert lengths == [20, 1, 1, 1, 1, 1]
    assert speeds["prefill_tokens_per_s"] == 20 / speeds["ttft_s"]


def test_the_peers_batch_is_padded_on_the_left_and_gives_what_each_prompt_gives_alone(script, monkeypatch):
    peer = script.make_peer(SHAPES["tiny"], dtype="float32", context=160)
    given, generate = [], peer.generate
    monkeypatch.setattr(peer, "generate", lambda ids, **options: given.append((ids, options, generate(ids, **options))) or given[-1][2])
    prompts = [[5, 6, 7], [8], [9] * 6]
    speed = script.time_peer_batch(peer, prompts, 4)
    for prompt in prompts:
        script.time_peer_batch(peer, [prompt], 4)
    (ids, options, together), *alone = given
    assert ids.tolist() == [[0, 0, 0, 5, 6, 7], [0, 0, 0, 0, 0, 8], [9] * 6]
    assert options["attention_mask"].sum(1).tolist() == [3, 1, 6]
    assert [row[-4:] for row in together.tolist()] == [out[0, -4:].tolist() for _, _, out in alone]
    assert speed["output_tokens_per_s"] == 12 / speed["seconds"]


def test_rows_that_give_too_few_tokens_are_no_result(script):
    with pytest.raises(ValueError, match=r"rows gave \[3, 4\] tokens, not 4 each"):
        script._batch_speed([[1] * 4, [1] * 3], 4, 1.0)


@pytest.mark.parametrize(("dtype", "sizes"), [("float32", ["3"]), ("bfloat16", [])])
def test_the_file_holds_the_setup_the_machine_and_every_pair(script, tmp_path, monkeypatch, capsys, dtype, sizes):
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 2**22)
    real_run = Workload.time_run
    # Decoding so small a model takes less than the clock's noise on a busy machine: it is said to take a second.
    monkeypatch.setattr(Workload, "time_run", lambda self, llm: (lambda run: RunTimes(run.short, run.short + 1.0, run.ttft))(real_run(self, llm)))
    path = tmp_path / "result.json"
    assert script.main([*SMALL, "--dtype", dtype, "--batch-sizes", *sizes, "--output", str(path)]) == 0
    report = json.loads(path.read_text())
    assert list(report["parts"]) == ["latency", *(f"batch-{size}" for size in sizes)]
    for part in report["parts"].values():
        assert 2 <= len(part["pairs"]) <= 3
        assert part["num_repeats"] == len(part["pairs"]) - 2
        assert {"load_average_before", "load_average_after", "counts", *part["medians"]} <= set(part["pairs"][0])
        assert len(part["pairs"][0]["bandwidth_samples_bytes_per_s"]) == 2 * bandwidth.NUM_PASSES
    assert {"ttft_s", "peer_ttft_s", "prefill_tokens_ratio", "decode_tokens_ratio"} <= set(report["parts"]["latency"]["medians"])
    for size in sizes:
        assert {"output_tokens_per_s", "peer_output_tokens_per_s", "output_tokens_ratio"} <= set(report["parts"][f"batch-{size}"]["medians"])
    assert {"torch", "transformers", "cpu_model", "load_average", "date"} <= set(report["machine"])
    assert report["setup"]["dtype"] == dtype
    assert report["setup"]["peer_attention"] == "sdpa"
    table, rows = capsys.readouterr().out, ["latency: prefill", "latency: decode", *(f"batch-{size}: output" for size in sizes)]
    assert all(text in table for text in (*rows, "transformers", "ratio", "result.json"))


def test_a_decode_too_short_to_measure_is_no_result(script, tmp_path, monkeypatch):
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 2**22)
    runs = iter([RunTimes(9.0, 2.0, 1.0), RunTimes(1.0, 2.0, 1.0), RunTimes(2.0, 1.9, 1.0)])  # the first compiles, the last is too short
    monkeypatch.setattr(Workload, "time_run", lambda self, llm: next(runs))
    with pytest.raises(ValueError, match="raise --output-len"):
        script.main([*SMALL, "--output", str(tmp_path / "result.json")])
    assert not list(runs)


def test_a_result_that_could_not_be_written_is_refused_first(script, tmp_path):
    with pytest.raises(ValueError, match="cannot write"):
        script.main([*SMALL, "--output", str(tmp_path / "nowhere" / "result.json")])
