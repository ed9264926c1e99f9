"""Every family and rope kind against ``transformers`` in float32 with eager attention, on one device and on meshes."""
import functools
import json

import numpy as np
import pytest
from tiny_models import ARCHITECTURES, MODELS, NUM_STEPS, ROPE, cached_greedy, config_json

from tpllm.families.registry import find_family

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
