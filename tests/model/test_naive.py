"""The loop without a cache against the loop with one."""
import pytest

from sharding_rules import DATA_TENSOR, make_mesh
from tests.support.naive import greedy
from tests.support.tiny_models import MODELS, cached_greedy, place
from tpllm.families.registry import find_family
from tpllm.model.partition import fit_to_mesh

BY_NAME = {model.name: model for model in MODELS}


@pytest.mark.parametrize("name", ["mistral-default", "llama-dynamic"])
def test_the_naive_loop_chooses_the_tokens_of_the_cached_one(name):
    params, config = BY_NAME[name].on_mesh(1)
    prompt = BY_NAME[name].prompt()
    assert greedy(params, config, prompt, num_steps=20) == cached_greedy(params, config, prompt, num_steps=20, prefill_chunk=1)[1]


def test_the_naive_loop_runs_on_a_data_and_tensor_mesh_and_without_one():
    model = BY_NAME["qwen3-linear"]
    meshless = place(model.weights(), model.config, find_family(model.hf))
    config = fit_to_mesh(model.config, make_mesh({"dp": 2, "tp": 2}), DATA_TENSOR)
    params = place(model.weights(), config, find_family(model.hf))
    tokens = greedy(meshless, model.config, model.prompt(), num_steps=8)
    assert greedy(params, config, model.prompt(), num_steps=8) == tokens


def test_what_was_chosen_first_does_not_depend_on_how_many_follow():
    model = BY_NAME["mistral-default"]
    params, config = model.on_mesh(1)
    assert greedy(params, config, model.prompt(), num_steps=20)[:3] == greedy(params, config, model.prompt(), num_steps=3)
