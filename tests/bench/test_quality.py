"""``tpllm bench quality``: paired perplexities, which the plain forward pass gives too."""
import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpllm
from tpllm import LLM, forward
from tpllm.bench import quality
from tpllm.bench.held_out import library_files
from tpllm.bench.quality import Predictions
from tpllm.cli.main import main
from tpllm.errors import ConfigError
from tpllm.loading import load_model

SIZES = ["--windows", "4", "--window-len", "48"]
SMALL = [*SIZES, "--mesh", "tp=1", "--dtype", "float32"]
ROW = {"name", "model", "quantization", "kv_cache_dtype", "weight_bytes", "kv_bytes_per_token", "perplexity", "perplexity_increase",
       "standard_error", "best_token_share"}


def arguments(*words):
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    return parser.parse_args(words)


def test_a_table_and_json_with_every_variant(tmp_path, capsys):
    assert main(["bench", "quality", *SMALL, "--quantization", "int8", "*=int4", "none", "--kv-cache-dtype", "int8", "--files",
                 str(pathlib.Path(tpllm.__file__).parent / "demo"), "--json", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    base, int8, int4, cache, again = report["results"]
    assert all(set(row) == ROW for row in report["results"])
    assert [row["name"] for row in report["results"]] == ["as it is", "int8", "*=int4", "KV cache int8", "demo"]
    for row in (base, again):
        assert (row["perplexity_increase"], row["standard_error"], row["best_token_share"]) == (0, 0, 1)
    assert abs(int8["perplexity_increase"]) < 0.01
    assert int8["perplexity"] / base["perplexity"] - 1 == pytest.approx(int8["perplexity_increase"], abs=1e-9)
    assert int4["best_token_share"] < int8["best_token_share"] <= 1
    assert int4["weight_bytes"] < 0.6 * int8["weight_bytes"] < 0.2 * base["weight_bytes"]
    assert cache["weight_bytes"] == base["weight_bytes"]
    assert base["kv_bytes_per_token"] == 5 * 2 * 4 * 64 * 4
    assert cache["kv_bytes_per_token"] == 5 * 2 * 4 * (64 + 4)
    table = capsys.readouterr().out
    assert all(text in table for text in ("demo, float32, mesh tp=1; 4 windows of 48 tokens: held-out files", "KV cache int8", "100.0%", "±"))


def test_losses_and_best_tokens_are_those_of_the_forward_pass():
    config, params, _ = load_model("demo", "tp=1", dtype="float32")
    with LLM("demo", mesh="tp=1", dtype="float32", max_model_len=49) as llm:
        windows_WT = quality.draw_windows(llm.get_tokenizer(), ["x = 1\n" * 200, "def f(a):\n    return a\n" * 40], 48, 3, seed=1)
        found = quality.predict(llm, windows_WT)
    positions = jnp.broadcast_to(jnp.arange(48), windows_WT.shape)
    logits_WTV = forward(params, jnp.asarray(windows_WT), positions, None, config)[0]
    scores_WTV = np.asarray(jax.nn.log_softmax(logits_WTV))[:, :-1]
    np.testing.assert_allclose(found.losses, -np.take_along_axis(scores_WTV, windows_WT[:, 1:, None], 2)[..., 0], atol=2e-4)
    assert (found.best == scores_WTV.argmax(-1)).mean() > 0.99


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    losses, more = rng.normal(3, 1, (6, 10)), rng.normal(0.1, 0.05, (6, 10))
    base = Predictions(losses, np.zeros((6, 10), int), 8, 4.0)
    row = quality.compare(Predictions(losses + more, np.eye(6, 10, dtype=int), 4, 2.0), base)
    assert row["perplexity_increase"] == pytest.approx(np.exp(more.mean()) - 1)
    assert row["standard_error"] == pytest.approx(more.mean(1).std(ddof=1) / 6**0.5)
    assert row["best_token_share"] == pytest.approx(0.9)


def test_held_out_files_are_a_tenth_and_not_those_of_training():
    held_out, others = ({name for name, _ in library_files(is_held_out=is_held_out)} for is_held_out in (True, False))
    assert not held_out & others
    assert 0.05 < len(held_out) / len(held_out | others) < 0.15


@pytest.mark.parametrize(("words", "message"), [
    (["--text", "missing.txt"], "cannot read missing.txt"), (["--windows", "9"], "fewer than 9; give more text"),
    (["--quantization", "int3"], "quantization is 'int3'"), (["--kv-cache-dtype", "int4"], "kv_cache_dtype is 'int4'"),
    (["--json", "missing/r.json"], "cannot write missing/r.json")])
def test_what_cannot_be_measured_is_refused(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("text.txt").write_text("def f(a, b):\n    return a + b\n" * 20)
    assert main(["bench", "quality", *SMALL, "--text", "text.txt", "--quantization", "--kv-cache-dtype", *words]) == 2
    assert message in capsys.readouterr().err


def test_models_of_other_tokens_are_refused(monkeypatch):
    drawn = iter([np.zeros((4, 48), np.int32), np.ones((4, 48), np.int32)])
    monkeypatch.setattr(quality, "draw_windows", lambda *args: next(drawn))
    with pytest.raises(ConfigError, match="demo-draft has other tokens than demo"):
        quality.measure(arguments(*SMALL, "--quantization", "--kv-cache-dtype", "--files", "demo-draft"))
