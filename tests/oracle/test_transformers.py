"""Every family and rope kind against ``transformers`` in float32 with eager attention, on one device and on meshes."""
import functools
import json

import numpy as np
import pytest

from sharding_rules import TENSOR, make_mesh
from tests.support.tiny_models import ARCHITECTURES, MODELS, NUM_STEPS, ROPE, cached_greedy, config_json
from tpllm.checkpoint.folder import open_checkpoint
from tpllm.checkpoint.load import load_params
from tpllm.families.registry import find_family
from tpllm.model.partition import fit_to_mesh

pytestmark = pytest.mark.oracle
transformers_oracle = pytest.importorskip("transformers_oracle", reason="needs torch and transformers: pip install -e .[oracle]")
BY_NAME = {model.name: model for model in MODELS}


@functools.cache
def clear_seed(name):
    return transformers_oracle.first_clear_seed(BY_NAME[name])


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("name", BY_NAME)
def test_logits_and_64_greedy_tokens_are_those_of_transformers(name, tp, record_property):
    model, reference = clear_seed(name)
    record_property("seed", model.seed)
    params, config = model.on_mesh(tp)
    logits, tokens = cached_greedy(params, config, model.prompt(), num_steps=NUM_STEPS, prefill_chunk=16)
    assert np.abs(logits - reference.logits).max() / reference.logits.std() <= (1e-4 if tp == 1 else 3e-4)
    assert tokens == reference.tokens


@pytest.mark.parametrize(("ep", "tp"), [(2, 1), (2, 2)])
@pytest.mark.parametrize("name", [model.name for model in MODELS if model.config.num_experts])
def test_experts_over_their_own_axis(name, ep, tp):
    model, reference = clear_seed(name)
    params, config = model.on_mesh(tp, ep=ep)
    assert config.partition.mesh.size == ep * tp
    logits, tokens = cached_greedy(params, config, model.prompt(), num_steps=NUM_STEPS, prefill_chunk=16)
    assert np.abs(logits - reference.logits).max() / reference.logits.std() <= 3e-4
    assert tokens == reference.tokens


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_what_transformers_5_saves_and_what_4_saved_read_as_the_same_model(family, rope, tmp_path):
    hf = config_json(family, rope, writer=4)
    expected = find_family(hf).config_from_hf(hf)
    config = transformers_oracle.hf_config(hf)
    config.architectures = hf["architectures"]
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_scaling" not in saved
    assert saved["rope_parameters"]["rope_type"] == rope
    assert find_family(saved).config_from_hf(saved) == expected


@pytest.mark.parametrize("name", ["llama-yarn", "mistral-linear", "qwen2-llama3", "qwen3-dynamic", *(
    model.name for model in MODELS if model.name.split("-")[0] not in ARCHITECTURES)])
def test_a_folder_that_transformers_saved_loads_and_gives_its_tokens(name, tmp_path):
    model, reference = clear_seed(name)
    saved = transformers_oracle.build(model)
    saved.config.architectures = model.hf["architectures"]
    saved.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == model.config
    config = fit_to_mesh(checkpoint.config, make_mesh({"tp": 4}), TENSOR)
    params = load_params(checkpoint, config, dtype="float32")
    logits, tokens = cached_greedy(params, config, model.prompt(), num_steps=NUM_STEPS, prefill_chunk=16)
    assert np.abs(logits - reference.logits).max() / reference.logits.std() <= 3e-4
    assert tokens == reference.tokens
