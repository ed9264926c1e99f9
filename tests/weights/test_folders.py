"""Quantized folders through the loader: the logits of what they stand for, packed or not, on one device and cut."""
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.quantized_folders import KINDS, make_folder
from tpllm import LLM, SamplingParams, forward
from tpllm.checkpoint.folder import open_checkpoint
from tpllm.checkpoint.source import DEMO_FOLDER
from tpllm.loading import load_model
from tpllm.weights.native import NativeWeight
from tpllm.weights.xla import XlaWeight

QUICK = ["gptq-4bit-g32-sym", "gptq-3bit-g64-asym-act", "awq-g32", "compressed-w4a16-g32-asym", "compressed-mixed", "fp8-block", "bnb-int8"]
"""The others run in the slow suite."""
QUANTIZES_INPUT = ["compressed-w8a8", "compressed-w8a8-static", "compressed-w8a8-asym"]


@pytest.fixture
def folders(tmp_path):
    """A function of a kind: (the quantized folder, a plain one of the float32 weights that it stands for)."""
    def make(kind):
        found = tmp_path / "quantized", tmp_path / "plain"
        for folder in found:
            folder.mkdir()
            shutil.copy(DEMO_FOLDER / "tokenizer.json", folder)
        weights = make_folder(found[0], kind)
        config = json.loads((found[0] / "config.json").read_text())
        (found[1] / "config.json").write_text(json.dumps({key: value for key, value in config.items() if not key.endswith("tion_config")}))
        save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, found[1] / "model.safetensors")
        return found
    return make


def logits_of(folder, mesh, *, packed):
    config, params, _ = load_model(str(folder), mesh, dtype="float32", packed=packed)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 200, (2, 9)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), tokens.shape)
    run = jax.jit(lambda params: forward(params, tokens, positions, None, config)[0])
    return np.asarray(run(params)), params


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow]) for kind in KINDS])
def test_a_quantized_folder_gives_the_logits_of_what_it_stands_for(native_library, folders, kind):
    quantized, plain = folders(kind)
    expected, _ = logits_of(plain, "tp=1", packed=False)
    bar = 0.3 if kind in QUANTIZES_INPUT else 1e-4
    is_kept = open_checkpoint(quantized).weights.find("model.layers.0.mlp.up_proj.weight", (256, 128)).scheme is not None
    for mesh, packed in (("tp=1", True), ("tp=2", False), ("tp=4", True)):
        found, params = logits_of(quantized, mesh, packed=packed)
        assert np.abs(found - expected).max() < bar * expected.std(), (mesh, packed)
        assert isinstance(params.layers[0].mlp.up, NativeWeight if packed else XlaWeight if is_kept else jax.Array)


@pytest.mark.parametrize("kind", ["compressed-w4a16-g32-sym", "gptq-4bit-g32-sym-act", "fp8-channel"])
def test_the_engine_gives_the_greedy_tokens_of_the_dequantized_weights(folders, kind):
    quantized, plain = folders(kind)
    prompts = [{"prompt_token_ids": [3, 1, 4, 1, 5]}, {"prompt_token_ids": [9, 2, 6]}]
    options = {"mesh": "tp=2", "dtype": "float32", "max_model_len": 32, "max_num_seqs": 2}
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    found = [[output.outputs[0].token_ids for output in LLM(str(folder), **options).generate(prompts, sampling, use_tqdm=False)]
             for folder in (quantized, plain)]
    assert found[0] == found[1]


def test_what_a_checkpoint_keeps_can_be_quantized_again_or_left_dense(folders):
    quantized, _ = folders("fp8-channel")
    load = {"mesh": "tp=1", "dtype": "float32"}
    again = load_model(str(quantized), quantization={"*.mlp.*": "int4", "*": "none"}, **load)[1]
    assert again.layers[0].mlp.up.layout.scheme.name == "int4"
    assert isinstance(again.layers[0].attn.q, jax.Array)
    kept = load_model(str(quantized), quantization={"*.mlp.*": "int4"}, **load)[1]
    assert kept.layers[0].attn.q.layout.scheme.kind == "e4m3"
    np.testing.assert_array_equal(kept.layers[0].attn.q.dequantize(), again.layers[0].attn.q)
