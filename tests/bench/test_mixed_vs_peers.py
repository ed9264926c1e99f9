"""The benchmark of mixed lengths: every side completes the same requests, over as many sequences, and everything measured is written down."""
import json

import numpy as np
import pytest

from tests.bench.conftest import load_script
from tpllm.bench import bandwidth
from tpllm.bench.shapes import SHAPES
from tpllm.errors import ConfigError

SMALL = ["--shape", "tiny", "--num-requests", "6", "--max-num-seqs", "3", "--prompt-lens", "4", "20", "--output-lens", "2", "12",
         "--output-median", "6", "--trial-requests", "2", "--rounds", "2", "--max-repeats", "0", "--allow-slow-peer"]
SIZES = {"num_seqs": 2, "context_len": 64, "num_threads": 1}
pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def script():
    return load_script("benchmarks.cpu.mixed_vs_peers", llama_cpp="llama-cpp-python", gguf="gguf", torch="torch", transformers="transformers")


@pytest.fixture(scope="module")
def parallel(script):
    """The module with llama.cpp's loop."""
    import sys
    return sys.modules["benchmarks.cpu.peers.llama_cpp_parallel"]


@pytest.fixture(scope="module")
def model(script, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "F16.gguf"
    script.gguf_file.write_f16(path, SHAPES["tiny"])
    model = script.llama_cpp_model.PeerModel(path)
    yield model
    model.close()


@pytest.fixture
def calls(script, monkeypatch):
    """Each call of llama_decode as a list of (sequence, token, position, whether logits are wanted)."""
    calls, decode = [], script.llama_cpp.llama_decode

    def noted(handle, batch):
        calls.append([(batch.seq_id[place][0], batch.token[place], batch.pos[place], batch.logits[place]) for place in range(batch.n_tokens)])
        return decode(handle, batch)
    monkeypatch.setattr(script.llama_cpp, "llama_decode", noted)
    return calls


@pytest.fixture
def one_thread(script, monkeypatch):
    """Peers whose threads wait for each other are slow where other tests run too."""
    monkeypatch.setenv("TPLLM_NUM_THREADS", "1")
    before = script.torch.get_num_threads()
    yield
    script.torch.set_num_threads(before)


def requests(parallel, count: int) -> list:
    rng = np.random.default_rng(1)
    return [parallel.PeerRequest(rng.integers(0, 512, rng.integers(3, 30)).tolist(), int(rng.integers(1, 9))) for _ in range(count)]


def test_llama_cpp_gets_a_token_of_every_sequence_and_the_prompt_of_the_next_request_in_one_call(parallel, model, calls):
    context = parallel.ParallelContext(model, **SIZES, has_flash_attention=True, is_unified=True)
    asked = [parallel.PeerRequest(prompt, output_len) for prompt, output_len in (([5, 6, 7], 2), ([8, 9], 4), ([3, 4], 1))]
    tokens = context.run(asked)
    assert [len(row) for row in tokens] == [2, 4, 1]
    assert calls == [
        [(0, 5, 0, 0), (0, 6, 1, 0), (0, 7, 2, 1), (1, 8, 0, 0), (1, 9, 1, 1)],
        [(0, tokens[0][0], 3, 1), (1, tokens[1][0], 2, 1)],
        [(1, tokens[1][1], 3, 1), (0, 3, 0, 0), (0, 4, 1, 1)],  # the first request has ended, the third has its sequence
        [(1, tokens[1][2], 4, 1)],
    ]
    assert context.run(asked) == tokens
    context.close()


def test_prompts_longer_than_a_batch_are_cut_and_the_first_one_goes_first(parallel, model, calls, monkeypatch):
    monkeypatch.setattr(parallel, "BATCH", 8)
    context = parallel.ParallelContext(model, **SIZES, has_flash_attention=False, is_unified=False)
    tokens = context.run([parallel.PeerRequest(list(range(10)), 2), parallel.PeerRequest(list(range(20, 29)), 1)])
    context.close()
    assert [[(seq, position) for seq, _, position, _ in call] for call in calls] == [
        [(0, place) for place in range(8)], [(0, 8), (0, 9), *((1, place) for place in range(6))],
        [(0, 10), (1, 6), (1, 7), (1, 8)]]
    assert [len(row) for row in tokens] == [2, 1]


@pytest.mark.parametrize("is_unified", [True, False])
@pytest.mark.parametrize("is_fused", [True, False])
def test_llama_cpps_requests_get_together_what_each_gets_alone(parallel, model, is_fused, is_unified):
    asked, found = requests(parallel, 9), []
    for num_seqs in (3, 1):
        context = parallel.ParallelContext(model, **{**SIZES, "num_seqs": num_seqs}, has_flash_attention=is_fused, is_unified=is_unified)
        found.append(context.run(asked))
        context.close()
    assert [len(row) for row in found[0]] == [request.output_len for request in asked]
    # Sums run in another order with other numbers of rows: a row may leave the other one where its two best tokens are nearly as good.
    assert sum(together == alone for together, alone in zip(*found, strict=True)) >= 6


def test_the_fastest_of_four_contexts_is_chosen_by_trials(parallel, model, monkeypatch):
    speeds = iter([1.0, 2.0, 4.0, 3.0, 1.0, 5.0, 2.0, 2.0])
    monkeypatch.setattr(parallel, "time_parallel", lambda context, asked: {"output_tokens_per_s": next(speeds)})
    context, trials = parallel.choose_context(model, [], **SIZES)
    assert trials == {"fused, unified": [1.0, 1.0], "fused, split": [2.0, 5.0], "products, unified": [4.0, 2.0], "products, split": [3.0, 2.0]}
    assert len(context.run(requests(parallel, 3))) == 3
    context.close()


def test_a_request_longer_than_a_sequence_is_refused(parallel, model):
    context = parallel.ParallelContext(model, **SIZES, has_flash_attention=True, is_unified=True)
    with pytest.raises(ValueError, match="a request of 65 tokens is more than a sequence's 64"):
        context.run([parallel.PeerRequest([1] * 60, 5)])
    context.close()


def test_transformers_requests_get_together_what_generate_gives_each_alone(script, parallel, one_thread):
    import torch

    from benchmarks.cpu.peers.transformers_batch import run_batch
    model, asked = script.make_peer(SHAPES["tiny"], dtype="float32", context=64), requests(parallel, 7)
    seconds, tokens = run_batch(model, asked, num_seqs=3, context_len=64)
    alone = [model.generate(torch.tensor([request.prompt_token_ids]), do_sample=False, max_new_tokens=request.output_len)[0].tolist()
             for request in asked]
    assert seconds > 0
    assert [request.prompt_token_ids + row for request, row in zip(asked, tokens, strict=True)] == alone
    assert model.config._attn_implementation == "sdpa"


def test_the_file_holds_the_setup_the_machine_every_round_and_its_ratios(script, tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 2**22)
    path = tmp_path / "result.json"
    assert script.main([*SMALL, "--kinds", "bf16", "int4", "--output", str(path)]) == 0
    report = json.loads(path.read_text())
    assert {"llama_cpp_python", "llama_cpp_system", "torch", "transformers", "cpu_model", "load_average", "date"} <= set(report["machine"])
    assert (report["setup"]["num_requests"], report["setup"]["max_num_seqs"], report["setup"]["num_threads"]) == (6, 3, 1)
    for kind, peers in (("bf16", ["llama_cpp", "transformers"]), ("int4", ["llama_cpp"])):
        entry = report["kinds"][kind]
        assert list(entry["ratios"]) == ["static", *peers]
        assert entry["llama_cpp"]["type"] == {"bf16": "F16", "int4": "Q4_0"}[kind]
        assert (set(entry["llama_cpp"]["trials_tokens_per_s"]), entry["bandwidth"]["samples_bytes_per_s"] != []) == (
            {"fused, unified", "fused, split", "products, unified", "products, split"}, True)
        assert len(entry["rounds"]) == 2
        for one in entry["rounds"]:
            speed = one["continuous_output_tokens_per_s"]
            assert one["ratios"] == {"static": speed / one["static_output_tokens_per_s"],
                                     **{name: speed / one[f"peer_{name}_output_tokens_per_s"] for name in peers}}
            assert {"counts", "load_average_before", "continuous_slot_occupancy", "continuous_host_share"} <= set(one)
            total = report["setup"]["num_output_tokens"]
            assert all(one[f"{side}_seconds"] * one[f"{side}_output_tokens_per_s"] == pytest.approx(total)
                       for side in ("continuous", "static", *(f"peer_{name}" for name in peers)))
        assert {"measured", "allowed", "share_of_allowed"} <= set(entry["gain"])
        assert set(entry["timelines"]) == {"continuous", "static"}
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("continuous", "static", "llama_cpp", "transformers", "lengths allow", "result.json"))


@pytest.mark.parametrize(("words", "message"), [
    (["--output-lens", "2", "500"], "the longest row has 520 tokens, tiny has a context of 512; lower --prompt-lens or --output-lens"),
    (["--kinds", "int4", "--peers", "transformers"], "nobody takes part beside int4"),
    (["--shape", "huge"], "unknown shape 'huge'"),
])
def test_what_cannot_be_measured_is_refused(script, tmp_path, words, message, one_thread):
    with pytest.raises(ConfigError, match=message):
        script.main([*SMALL, *words, "--output", str(tmp_path / "result.json")])
