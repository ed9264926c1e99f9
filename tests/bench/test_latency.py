"""``tpllm bench latency`` from the command line."""
import functools
import json

import pytest

from tests.bench.conftest import bench
from tpllm.bench import bandwidth, latency
from tpllm.errors import MemoryNeedError
from tpllm.native import instruction_set

SMALL = ["--prompt-len", "20", "--output-len", "4", "--runs", "2", "--warmup", "0"]
KEYS = {
    "machine": {"date", "tpllm", "python", "jax", "jaxlib", "platform", "device_kind", "instruction_set", "cpu_model", "num_cpus",
                "memory_bytes", "load_average"},
    "setup": {"model", "has_random_weights", "mesh", "dtype", "quantization", "kernels", "kv_cache_dtype", "prompt_len", "output_len",
              "batch_size", "num_runs", "num_warmup"},
    "results": {"ttft_s", "prefill_tokens_per_s", "step_s", "decode_tokens_per_s", "inter_token_ms", "load_s", "warm_up_s",
                "peak_host_bytes", "peak_device_bytes"},
    "decode_reads": {"weight_bytes", "weight_bytes_read", "kv_bytes_valid", "batch_size", "bytes_per_step", "bytes_per_token", "bytes_per_s",
                     "share_of_median_bandwidth", "share_of_best_bandwidth"},
    "bandwidth": {"measured", "best_bytes_per_s", "median_bytes_per_s", "samples_bytes_per_s"},
}


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    """Bandwidth is read from 4 MB here."""
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 2**22)


exit_code = functools.partial(bench, "latency")


def test_a_shape_gives_a_table_and_json_with_every_number(tmp_path, capsys):
    assert exit_code("--shape", "tiny", "--mesh", "tp=2", "--dtype", "float32", "--batch-size", "3", *SMALL, "--json", str(tmp_path / "r.json")) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report) == {"benchmark", "runs_s", *KEYS}
    for part, keys in KEYS.items():
        assert set(report[part]) == keys, part
    assert report["setup"] == {"model": "tiny", "has_random_weights": True, "mesh": "tp=2", "dtype": "float32", "quantization": None,
                               "kernels": f"native {instruction_set()}" if instruction_set() else "xla", "kv_cache_dtype": "float32",
                               "prompt_len": 20, "output_len": 4, "batch_size": 3, "num_runs": 2, "num_warmup": 0}
    assert [set(run) for run in report["runs_s"]] == [{"short", "long", "ttft"}] * 2
    assert len(report["bandwidth"]["samples_bytes_per_s"]) == 2 * bandwidth.NUM_PASSES
    assert report["results"]["peak_host_bytes"] > report["decode_reads"]["weight_bytes"] > 10**6
    assert report["results"]["peak_device_bytes"] is None
    table = capsys.readouterr().out
    assert all(text in table for text in ("tiny (random weights), float32, mesh tp=2 (cpu), batch 3, prompt 20, output 4",
                                          "time to first token", "prefill", "decode", "memory reads", "share of the median"))


def test_the_demo_model_is_measured_as_it_is_stored(tmp_path, capsys):
    assert exit_code("--model", "demo", "--mesh", "tp=1", *SMALL, "--json", str(tmp_path / "r.json")) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["setup"]["model"], report["setup"]["has_random_weights"]) == ("demo", False)
    assert "making random weights" not in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (["--shape", "huge"], "unknown shape 'huge'; known: tiny, llama-160m, tinyllama-1.1b"),
    (["--shape", "tiny", "--mesh", "tp=1", "--prompt-len", "600"], "max_model_len is 632; the model's context is 512"),
    (["--shape", "tiny", "--mesh", "tp=1", "--dtype", "int3"], "dtype is 'int3'; it must be one of auto, float32"),
    (["--shape", "tiny", "--mesh", "tp=999"], "needs 999 devices"),
    (["--shape", "tiny", "--json", "none/r.json"], "cannot write none/r.json; give a file in a folder that exists"),
    (["--shape", "tiny", "--output-len", "1"], "1 is no whole number of at least 2"),
    (["--shape", "tiny", "--runs", "0"], "0 is no whole number of at least 1"),
    (["--shape", "tiny", "--model", "demo"], "not allowed with argument"),
    ([], "one of the arguments --model --shape is required"),
])
def test_what_cannot_be_measured_is_one_line_and_code_2(words, message, capsys, monkeypatch):
    monkeypatch.setattr(latency, "host_bandwidth", lambda free_bytes: bandwidth.Bandwidth((1.0,)))
    assert exit_code(*words) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("tpllm: error: ")
    assert message in line


def test_a_shape_that_does_not_fit_is_refused_before_any_weight_is_made(monkeypatch):
    monkeypatch.setattr("tpllm.checkpoint.memory.host_free_bytes", lambda: 2**30)
    monkeypatch.setattr("tpllm.bench.shapes.init_params", None)
    from tpllm.bench.shapes import llm_of_shape
    with pytest.raises(MemoryNeedError, match=r"needs 26[0-9]\.[0-9]+ GiB of host memory, 1\.00 GiB are free"):
        llm_of_shape("llama-3.1-70b", mesh="tp=1", dtype="float32", max_model_len=160, max_num_seqs=1)
