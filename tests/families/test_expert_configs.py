"""Which layers have experts, how many and how large: what config.json says of it."""
import pytest

from tests.support.tiny_models import config_json
from tpllm.errors import ConfigError
from tpllm.families.registry import find_family


def read(family, **fields):
    hf = config_json(family, **fields)
    return find_family(hf).config_from_hf(hf)


@pytest.mark.parametrize(("fields", "sparse_layers"), [
    ({}, (True, True)), ({"mlp_only_layers": [0]}, (False, True)), ({"decoder_sparse_step": 2, "num_hidden_layers": 3}, (False, True, False))])
def test_layers_have_experts_by_step_but_for_those_that_are_named(fields, sparse_layers):
    assert read("qwen2moe", **fields).sparse_layers == sparse_layers


def test_each_family_says_how_large_experts_are_and_how_they_are_weighed():
    mixtral, qwen2, qwen3 = read("mixtral"), read("qwen2moe"), read("qwen3moe")
    assert (mixtral.num_experts, mixtral.num_experts_per_token, mixtral.expert_size, mixtral.normalizes_expert_weights) == (8, 2, 56, True)
    assert (qwen2.num_experts, qwen2.expert_size, qwen2.shared_expert_size, qwen2.normalizes_expert_weights) == (6, 24, 40, False)
    assert (qwen3.num_experts_per_token, qwen3.shared_expert_size, qwen3.normalizes_expert_weights, qwen3.has_qk_norm) == (2, 0, True, True)


def test_windows_that_are_switched_on_without_layer_types_are_in_every_other_layer_below_max_window_layers():
    windows = {"use_sliding_window": True, "sliding_window": 9, "num_hidden_layers": 5}
    assert read("qwen2moe", **windows).layer_windows == (9, None, 9, None, 9)
    assert read("qwen2moe", **windows, max_window_layers=2).layer_windows == (9, None, None, None, None)
    assert read("qwen3moe", **windows, mlp_only_layers=[]).layer_windows == (9,) * 5
    assert read("qwen2moe", sliding_window=0).layer_windows == (None, None)  # as transformers saves one that is not used


def test_the_number_of_experts_has_the_names_that_transformers_takes_and_the_alias_wins():
    assert read("mixtral", num_experts=4).num_experts == 4
    assert read("qwen3moe", num_local_experts=4).num_experts == 4
    assert read("qwen2moe", num_local_experts=4).num_experts == 6


@pytest.mark.parametrize(("family", "fields", "message"), [
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; it may be 8 at most"),
    ("qwen2moe", {"mlp_only_layers": 1}, "mlp_only_layers is 1; it must be a list of layers")])
def test_what_cannot_be_run_is_refused_with_the_field_named(family, fields, message):
    with pytest.raises(ConfigError, match=message):
        read(family, **fields)
