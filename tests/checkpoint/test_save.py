"""Saved quantized checkpoints: the same weights as quantizing at load, here and in transformers; whole or not there."""
import tracemalloc

import jax
import numpy as np
import pytest

from tests.support.checkpoint_files import write_folder
from tests.support.quantized_folders import SIZES, make_folder
from tests.support.tiny_models import TinyModel, cached_greedy, config_json
from tpllm.checkpoint import save
from tpllm.checkpoint.entries import find_entries
from tpllm.checkpoint.folder import open_checkpoint
from tpllm.checkpoint.load import load_params, stored_schemes
from tpllm.checkpoint.save import quantize_checkpoint
from tpllm.cli.main import main
from tpllm.errors import CheckpointError, ConfigError
from tpllm.weights.policy import parse_policy
from tpllm.weights.storage import Storage

MODEL = TinyModel("saved", config_json("llama", **SIZES))
FUSED = TinyModel("fused", config_json("phi3", hidden_size=64, intermediate_size=128, sliding_window=None))
SCHEMES = ["int8", "w8a8", "fp8", "int4", "int4-g64", "int4-g128", "*.mlp.*=int4,*.attn.o=none,*=int8"]
WEIGHT_ONLY = [scheme for scheme in SCHEMES if scheme != "w8a8"]


@pytest.fixture
def source(tmp_path):
    write_folder(tmp_path / "source", dict(MODEL.hf), MODEL.weights())
    return tmp_path / "source"


def load(folder, policy=None):
    """(config, parameters as XLA has them in float32)."""
    checkpoint = open_checkpoint(folder)
    stored = stored_schemes(find_entries(checkpoint, checkpoint.config), checkpoint.config)
    storage = Storage(np.dtype(np.float32), parse_policy(policy), stored=stored)
    return checkpoint.config, load_params(checkpoint, checkpoint.config, dtype=np.float32, storage=storage)


def at_load(scheme: str) -> str:
    """The same modules by ``quantization=``."""
    return f"embed=none,head=none,{scheme if '=' in scheme else f'*={scheme}'}"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_saved_folder_is_what_quantizing_at_load_gives(source, tmp_path, scheme):
    quantize_checkpoint(source, tmp_path / "out", scheme)
    config, saved = load(tmp_path / "out")
    _, quantized = load(source, at_load(scheme))
    for ours, theirs in zip(jax.tree.leaves(saved), jax.tree.leaves(quantized), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours).view(np.uint8), np.asarray(theirs).view(np.uint8))
    tokens = [cached_greedy(params, config, MODEL.prompt(), num_steps=16, prefill_chunk=41)[1] for params in (saved, quantized)]
    assert tokens[0] == tokens[1]


@pytest.mark.oracle
@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_transformers_opens_a_saved_folder_to_the_same_logits_and_tokens(source, tmp_path, scheme):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    quantize_checkpoint(source, tmp_path / "out", scheme)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager").eval()
    config, params = load(tmp_path / "out")
    logits, tokens = cached_greedy(params, config, MODEL.prompt(), num_steps=64, prefill_chunk=41)
    ids = list(MODEL.prompt())
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
        for _ in range(64):
            ids.append(int(theirs(torch.tensor([ids])).logits[0, -1].argmax()))
    assert np.abs(logits - expected).max() <= 1e-4 * expected.std()
    assert tokens == ids[len(MODEL.prompt()):]


@pytest.mark.parametrize("kind", ["gptq-4bit-g32-sym-act", "awq-g32", "bnb-nf4", "fp8-block"])
def test_a_quantized_source_is_dequantized_and_quantized_again(tmp_path, kind):
    weights = make_folder(tmp_path / "source", kind)
    write_folder(tmp_path / "plain", dict(MODEL.hf), weights)
    for name in ("source", "plain"):
        quantize_checkpoint(tmp_path / name, tmp_path / f"{name}-8", "int8")
    found = [load(tmp_path / f"{name}-8")[1].layers[1].mlp.down.dequantize() for name in ("source", "plain")]
    assert np.abs(found[0] - found[1]).max() <= 1.01 / 127 * np.abs(found[1]).max()


def test_fused_modules_are_written_whole_and_must_have_one_scheme(tmp_path):
    write_folder(tmp_path / "source", dict(FUSED.hf), FUSED.weights())
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", "int4")
    leaves = [jax.tree.leaves(load(*words)[1]) for words in ((tmp_path / "out",), (tmp_path / "source", at_load("int4")))]
    for ours, theirs in zip(*leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    with pytest.raises(ConfigError, match="one scheme"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "mixed", "*.attn.q=int4,*=int8")


def test_shards_hold_at_most_their_size_and_an_index_names_them(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "out", "int8", max_shard_bytes=120_000)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert all(path.stat().st_size < 130_000 for path in files)
    quantize_checkpoint(source, tmp_path / "one", "int8")
    for ours, theirs in zip(*(jax.tree.leaves(load(tmp_path / name)[1]) for name in ("out", "one")), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize(("scheme", "message"), [
    ("q4_k", "'q4_k' cannot be written"),
    ("llm.int8", "'llm.int8' cannot be written"), ("fp8-e5m2", "'fp8-e5m2' cannot be"), ("none", "quantizes no linear"), ("int3", "must be one of"),
    ("embed=int8,head=int8", "quantizes no linear")])
def test_what_cannot_be_written_is_refused_and_leaves_nothing(source, tmp_path, scheme, message):
    with pytest.raises(ConfigError, match=message):
        quantize_checkpoint(source, tmp_path / "out", scheme)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_groups_that_do_not_divide_are_refused(tmp_path):
    model = TinyModel("odd", config_json("llama"))
    write_folder(tmp_path / "source", dict(model.hf), model.weights())
    with pytest.raises(ConfigError, match="do not divide"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", "int4-g128")


def test_a_failed_write_leaves_no_folder_and_what_a_killed_one_left_is_replaced(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(save, "_write_safetensors", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(CheckpointError, match="No space left"):
            quantize_checkpoint(source, tmp_path / "out", "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/model.safetensors").write_bytes(b"half")
    quantize_checkpoint(source, tmp_path / "out", "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    load(tmp_path / "out")
    with pytest.raises(ConfigError, match="exists"):
        quantize_checkpoint(source, tmp_path / "out", "int8")


def test_memory_is_a_few_chunks_a_thread(tmp_path):
    model = TinyModel("wide", config_json("llama", hidden_size=1024, intermediate_size=8192, num_hidden_layers=1, head_dim=64))
    write_folder(tmp_path / "source", dict(model.hf), model.weights())
    quantize_checkpoint(tmp_path / "source", tmp_path / "first", "int4")
    tracemalloc.start()
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", "int4")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * save.CHUNK_BYTES < sum(path.stat().st_size for path in tmp_path.glob("source/*.safetensors")) / 2


def test_the_command_line(source, tmp_path, capsys):
    assert main(["quantize", str(source), str(tmp_path / "out"), "--scheme", "int8", "--max-shard-size", "0.0001"]) == 0
    assert "bytes" in capsys.readouterr().out
    assert len(list(tmp_path.glob("out/*.safetensors"))) > 1
    assert main(["quantize", str(source), str(tmp_path / "out"), "--scheme", "int8"]) == 2
    assert "exists" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["quantize", str(source), str(tmp_path / "new"), "--scheme", "int8", "--max-shard-size", "none"])
