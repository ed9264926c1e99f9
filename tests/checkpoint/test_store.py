"""Orbax stores: what was loaded on one mesh comes back on another, bit for bit."""
import json
import shutil

import jax
import numpy as np
import pytest

from sharding_rules import DATA_TENSOR, make_mesh
from tests.support.checkpoint_files import write_folder
from tests.support.tiny_models import TinyModel, config_json
from tpllm import LLM, SamplingParams
from tpllm.checkpoint.entries import find_entries
from tpllm.checkpoint.folder import open_checkpoint
from tpllm.checkpoint.load import load_params, stored_schemes
from tpllm.checkpoint.save import quantize_checkpoint
from tpllm.checkpoint.store import MANIFEST, WEIGHTS, write_store
from tpllm.cli.main import main
from tpllm.errors import CheckpointError, ConfigError
from tpllm.loading import save_store
from tpllm.model.params import named_leaves
from tpllm.model.partition import fit_to_mesh
from tpllm.weights.policy import parse_policy
from tpllm.weights.storage import NATIVE, Storage

POLICIES = [None, "int8", "w8a8", "fp8", "*=int4", "q4_k", "*.mlp.*=fp8-e5m2,*.attn.*=int8,*=none"]
SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 32}
DEMO = {"max_model_len": 64, "max_num_seqs": 2, "dtype": "float32"}


def loaded(path, axes, policy=None, *, is_packed=False, dtype="float32"):
    """(parameters, config)."""
    checkpoint = open_checkpoint(path)
    config = fit_to_mesh(checkpoint.config, make_mesh(axes), DATA_TENSOR)
    entries = find_entries(checkpoint, config)
    storage = Storage(np.dtype(dtype), parse_policy(policy), device=NATIVE if is_packed else None, stored=stored_schemes(entries, config))
    return load_params(checkpoint, config, dtype=dtype, storage=storage, entries=entries), config


@pytest.mark.parametrize(("family", "policy"), [*(("qwen2", policy) for policy in POLICIES), ("gemma2", None), ("gemma2", "q4_k"),
                                                *(("qwen2moe", policy) for policy in (None, "fp8", "*=int4", "q4_k", POLICIES[-1]))], ids=str)
def test_what_was_loaded_on_one_mesh_comes_back_on_others(tmp_path, family, policy):
    experts = {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256} if "moe" in family else {}
    vocabulary = {"vocab_size": 208} if policy and "4" in policy else {}  # zeros that pad it have codes of their own
    model = TinyModel(family, config_json(family, **SIZES, **experts, **vocabulary))
    write_folder(tmp_path / "model", dict(model.hf), model.weights())
    axes = {"tp": 4} if policy not in ("q4_k",) else {"tp": 1}  # two levels in 256 are cut in smaller groups by more devices
    params, config = loaded(tmp_path / "model", axes, policy)
    (tmp_path / "store").mkdir()
    write_store(tmp_path / "store", params, config, source={})
    (tmp_path / "store" / "config.json").write_text(json.dumps(dict(model.hf)))
    others = [({}, False), ({"tp": 2}, True), ({"tp": 8}, False)] + ([({"ep": 2, "tp": 2}, True)] if "moe" in family else [])
    for other, is_packed in others:
        found, expected = (dict(named_leaves(loaded(tmp_path / name, other, asked, is_packed=is_packed)[0]))
                           for name, asked in (("store", None), ("model", policy)))
        assert found.keys() == expected.keys()
        for name, array in found.items():
            assert array.dtype == expected[name].dtype
            values = (np.asarray(each).astype(np.float32) for each in (array, expected[name]))
            np.testing.assert_array_equal(*values, err_msg=f"{name} {other}")


@pytest.mark.parametrize("scheme", ["none", "q4_k"])
def test_the_command_saves_a_model_that_gives_the_same_tokens(tmp_path, scheme, capsys):
    assert main(["quantize", "demo", str(tmp_path / "out"), "--scheme", scheme, "--format", "orbax"]) == 0
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    tokens = []
    for model, quantization in ((str(tmp_path / "out"), None), ("demo", scheme)):
        with LLM(model, mesh="tp=2", quantization=quantization, **DEMO) as llm:
            tokens.append([output.outputs[0].token_ids for output in llm.generate(["def ", "class A:"], greedy, use_tqdm=False)])
    assert tokens[0] == tokens[1]
    assert main(["inspect", str(tmp_path / "out"), "--mesh", "tp=2"]) == 0
    assert "orbax of" in capsys.readouterr().out
    assert main(["quantize", "demo", str(tmp_path / "out"), "--scheme", scheme, "--format", "orbax"]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_quantized_checkpoint_can_be_stored_as_it_is(tmp_path):
    quantize_checkpoint("demo", tmp_path / "int4", "int4")
    save_store(str(tmp_path / "int4"), tmp_path / "store", mesh="tp=2")
    leaves = (jax.tree.leaves(loaded(tmp_path / name, {"tp": 1}, dtype="bfloat16")[0]) for name in ("store", "int4"))
    for found, expected in zip(*leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(found).view(np.uint8), np.asarray(expected).view(np.uint8))
    with pytest.raises(ConfigError, match="is an orbax store; quantize from the checkpoint"):
        quantize_checkpoint(tmp_path / "store", tmp_path / "again", "int8")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return save_store("demo", tmp_path_factory.mktemp("store") / "store", quantization="int8")


def copy_files(store, target):
    for path in store.iterdir():
        if path.is_file():
            shutil.copy(path, target)


@pytest.mark.parametrize(("change", "message"), [
    (lambda manifest: manifest.update(version=2), "version is 2; this version of tpllm reads 1"),
    (lambda manifest: manifest.pop("parameters"), "version is 1"),
    (lambda manifest: manifest["parameters"].pop("final_norm"), "'final_norm' of shape .* is missing"),
    (lambda manifest: manifest["parameters"]["layers.0.attn.q"].update(shape=[3, 4]), "has shape .3, 4.; config.json makes it"),
    (lambda manifest: manifest["parameters"]["layers.0.attn.q"].update(shape="x"), "layers.0.attn.q: ValueError"),
    (lambda manifest: manifest["parameters"]["layers.0.attn.q"]["scheme"].update(bits=4), "layers.0.attn.q.codes is int8 of shape"),
    (lambda manifest: manifest["parameters"]["layers.0.attn.q"]["scheme"].update(colour=4), "layers.0.attn.q: TypeError"),
])
def test_a_damaged_manifest_is_refused_with_what_is_wrong(store, tmp_path, change, message):
    manifest = json.loads((store / MANIFEST).read_text())
    change(manifest)
    copy_files(store, tmp_path)
    (tmp_path / WEIGHTS).symlink_to(store / WEIGHTS)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path, {"tp": 1})


def test_missing_weights_are_named(store, tmp_path):
    copy_files(store, tmp_path)
    with pytest.raises(CheckpointError, match=r"weights: .* cannot be read"):
        loaded(tmp_path, {"tp": 1})
