"""What config.json leaves out, sets to null or says twice, and values of the wrong kind. ``tests/oracle`` compares all of it with transformers."""
import logging

import pytest

from tests.support.tiny_models import config_json
from tpllm.errors import ConfigError
from tpllm.families.registry import FAMILIES, find_family

BY_NAME = {family.name: family for family in FAMILIES}
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}


def read(family, **fields):
    return BY_NAME[family].config_from_hf({"architectures": list(BY_NAME[family].architectures), **fields})



def test_a_file_that_says_nothing_else_is_the_model_of_its_family():
    found = {family.name: family.config_from_hf({}) for family in FAMILIES}
    assert {name: config.max_position for name, config in found.items()} == {
        "Llama": 2048, "Mistral": 131072, "Qwen2": 32768, "Qwen3": 32768, "Gemma": 8192, "Gemma2": 8192, "Gemma3": 131072, "Phi3": 4096,
        "OLMo2": 2048, "Granite": 2048, "SmolLM3": 32768, "StarCoder2": 4096, "Mixtral": 131072, "Qwen2Moe": 32768, "Qwen3Moe": 32768,
        "gpt-oss": 131072}
    assert {name: config.num_kv_heads for name, config in found.items()} == {
        "Llama": 32, "Mistral": 8, "Qwen2": 32, "Qwen3": 32, "Gemma": 16, "Gemma2": 4, "Gemma3": 4, "Phi3": 32, "OLMo2": 32, "Granite": 32,
        "SmolLM3": 4, "StarCoder2": 2, "Mixtral": 8, "Qwen2Moe": 16, "Qwen3Moe": 4, "gpt-oss": 8}
    assert (found["Qwen3"].head_dim, found["Mixtral"].rope.theta, found["gpt-oss"].rope.kind, found["OLMo2"].norm_eps) == (128, 1e6, "yarn", 1e-5)


@pytest.mark.parametrize(("family", "fields", "window"), [
    ("Mistral", {}, 4096), ("Mistral", {"sliding_window": None}, None), ("Mixtral", {}, None), ("Phi3", {}, None), ("StarCoder2", {}, None),
    ("Qwen2", {"use_sliding_window": True, "max_window_layers": 0}, 4096), ("Qwen3", {"use_sliding_window": True, "max_window_layers": 0}, 4096),
    ("Qwen2", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None}, None), ("Qwen2", {}, None)])
def test_a_window_that_is_left_out_is_the_familys_and_null_is_none(family, fields, window):
    assert read(family, **SMALL, **fields).layer_windows == (window, window)


def test_rope_scaling_goes_before_rope_parameters():
    linear, dynamic = {"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 70.0}
    rope = read("Llama", rope_scaling=linear, rope_parameters=dynamic, rope_theta=50.0).rope
    assert (rope.kind, rope.factor, rope.theta) == ("linear", 2.0, 50.0)
    assert read("Llama", rope_scaling=linear, rope_parameters=dynamic).rope.theta == 10000.0  # that of the rule that lost is lost too
    for empty in (None, {}):
        assert read("Llama", rope_scaling=empty, rope_parameters=dynamic).rope.kind == "dynamic"
    gemma3 = read("Gemma3", rope_scaling=linear, rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 9.0}})
    assert [(rope.kind, rope.theta) for rope in gemma3.layer_ropes[4:6]] == [("default", 1e4), ("linear", 9.0)]
    older = read("Gemma3", rope_scaling={"type": "linear", "factor": 8.0})  # beside a rope_type, which transformers has there by then
    assert older.layer_ropes == read("Gemma3").layer_ropes
    assert read("gpt-oss", rope_scaling=None).rope.kind == "yarn"
    assert read("gpt-oss", rope_parameters={}).rope.kind == "default"


def test_a_layer_list_that_a_family_does_not_have_is_not_used_and_the_log_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="tpllm"):
        config = read("Mistral", **SMALL, sliding_window=9, layer_types=["full_attention", "sliding_attention"])
    assert config.layer_windows == (9, 9)
    assert "layer_types is not used" in caplog.text


@pytest.mark.parametrize(("architectures", "model_type", "name"), [
    (None, "llama", "Llama"), ([], "qwen2", "Qwen2"), ("missing", "gemma3_text", "Gemma3"), (["LlamaModel"], "llama", "Llama"),
    (["Gemma3TextModel"], "gemma3_text", "Gemma3"), (["Qwen3ForCausalLM"], "unheard_of", "Qwen3"), (["Qwen3ForCausalLM"], None, "Qwen3"),
    (["LlamaForCausalLM"], "mistral", "Mistral")])
def test_the_family_follows_from_model_type_where_architectures_does_not_say_it(architectures, model_type, name):
    hf = {"model_type": model_type} | ({} if architectures == "missing" else {"architectures": architectures})
    assert find_family(hf).name == name


@pytest.mark.parametrize(("hf", "message"), [
    ({"architectures": None, "model_type": "mamba"}, r"unknown architecture \(none given\) of model_type 'mamba'; known: Llama"),
    ({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}, "unknown architecture LlamaForSequenceClassification"),
    ({"architectures": {"a": 1}}, "architectures is {'a': 1}; it must be a list of names"), ({"architectures": [1]}, r"architectures is \[1\]"),
    ({"architectures": None, "model_type": ["llama"]}, r"of model_type \['llama'\]")])
def test_a_model_of_no_known_kind_is_refused(hf, message):
    with pytest.raises(ConfigError, match=message):
        find_family(hf)


def test_whole_floats_count_as_whole_numbers():
    hf = config_json("llama")
    floats = {key: float(value) if type(value) is int else value for key, value in hf.items()}
    family = find_family(hf)
    config = family.config_from_hf(floats)
    assert config == family.config_from_hf(hf)
    assert type(config.num_heads) is int


@pytest.mark.parametrize(("family", "fields", "message"), [
    ("llama", {"num_attention_heads": True}, "num_attention_heads is True; it must be a whole number of at least 1"),
    ("llama", {"num_attention_heads": "8"}, "num_attention_heads is '8'; it must be a whole number of at least 1, without quotes"),
    ("llama", {"num_attention_heads": 8.5}, r"num_attention_heads is 8\.5"), ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'.*quotes"),
    ("llama", {"rms_norm_eps": None}, "rms_norm_eps is None; it must be a number above 0"), ("llama", {"rms_norm_eps": True}, "rms_norm_eps is True"),
    ("llama", {"attention_bias": "false"}, "attention_bias is 'false'; it must be true or false, without quotes"),
    ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"), ("llama", {"mlp_bias": 1}, "mlp_bias is 1; it must be true or"),
    ("qwen2", {"use_sliding_window": "no"}, "use_sliding_window is 'no'"), ("qwen2", {"max_window_layers": None}, "max_window_layers is None"),
    ("qwen3moe", {"norm_topk_prob": "false"}, "norm_topk_prob is 'false'"), ("qwen3moe", {"mlp_only_layers": [True]}, "mlp_only_layers is"),
    ("gemma2", {"use_bidirectional_attention": True}, "only causal"), ("gemma", {"use_bidirectional_attention": "no"}, "attention is 'no'"),
    ("starcoder2", {"use_bias": "false"}, "use_bias is 'false'"), ("smollm3", {"no_rope_layers": ["0", "1", "1"]}, "no_rope_layers is"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": "false"}}, "truncate is 'false'"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor is None; it must be a number above 0"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is None"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 1e300}}, r"rope factor 1e\+300 makes a context of 32 tokens"),
    ("llama", {"layer_types": []}, None), ("qwen3", {"use_sliding_window": True, "layer_types": [], "sliding_window": 3}, "layer_types is"),
])
def test_a_value_of_another_kind_is_refused_with_the_key_the_value_and_the_fix(family, fields, message):
    hf = config_json(family, **fields)
    if message is None:  # a key that the family does not read
        assert find_family(hf).config_from_hf(hf) == find_family(hf).config_from_hf(config_json(family))
        return
    with pytest.raises(ConfigError, match=message):
        find_family(hf).config_from_hf(hf)


def test_a_value_nested_too_deeply_for_python_to_write_is_refused_all_the_same():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ConfigError, match="hidden_act a list"):
        find_family(config_json("llama")).config_from_hf(config_json("llama", hidden_act=deep))
    while deep:
        deep = deep.pop()
