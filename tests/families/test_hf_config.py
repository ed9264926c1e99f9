"""Reading config.json: what each family makes of it, and how what cannot be run is refused."""
import math

import pytest

from tests.support.tiny_models import ARCHITECTURES, ROPE, config_json
from tpllm.errors import ConfigError
from tpllm.families.registry import FAMILIES, find_family
from tpllm.model.config import ModelConfig, RopeConfig
from tpllm.model.params import named_leaves, param_specs


def read(hf):
    return find_family(hf).config_from_hf(hf)


def without(hf, *names):
    return {key: value for key, value in hf.items() if key not in names}


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_both_ways_of_writing_rope_read_as_the_same_model(family, rope):
    config = read(config_json(family, rope, writer=4))
    assert config == read(config_json(family, rope, writer=5))
    assert (config.rope.kind, config.rope.theta) == (rope, 100.0)


@pytest.mark.parametrize(("rope", "max_position"), [("default", 32), ("linear", 80), ("dynamic", 96), ("llama3", 128), ("yarn", 128)])
def test_the_longest_context_is_what_the_rope_rule_serves(rope, max_position):
    assert read(config_json("llama", rope)).max_position == max_position


def test_a_llama_3_config_reads_field_by_field():
    hf = {"architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
          "num_key_value_heads": 8, "num_hidden_layers": 16, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05,
          "rope_theta": 500000.0, "tie_word_embeddings": True, "hidden_act": "silu", "rope_scaling": {
              "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
              "rope_type": "llama3"}}
    assert read(hf) == ModelConfig(
        vocab_size=128256, hidden_size=2048, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64, intermediate_size=8192,
        max_position=131072, norm_eps=1e-5, ties_embeddings=True,
        rope=RopeConfig(kind="llama3", theta=500000.0, factor=32.0, original_max_position=8192))


def test_the_oldest_way_of_writing_a_rope_kind_is_read():
    rope = read(config_json("llama", writer=4, rope_scaling={"type": "linear", "factor": 2.0})).rope
    assert (rope.kind, rope.factor) == ("linear", 2.0)


def test_a_yarn_factor_that_is_not_given_is_how_far_the_context_was_extended():
    hf = config_json("qwen2", "yarn", rope_fields={"factor": None})
    assert read(hf).rope.factor == 4.0


def test_a_file_without_kv_heads_or_head_dim_means_one_kv_head_a_head_and_an_even_split():
    config = read(without(config_json("llama", hidden_size=48), "num_key_value_heads", "head_dim"))
    assert (config.num_kv_heads, config.head_dim) == (8, 6)


@pytest.mark.parametrize(("family", "fields", "windows"), [
    ("mistral", {}, (9, 9)), ("mistral", {"sliding_window": None}, (None, None)), ("qwen2", {}, (None, 11)),
    ("qwen2", {"use_sliding_window": False}, (None, None)), ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, (11, None)),
    ("llama", {"sliding_window": 9}, (None, None))])
def test_a_window_holds_in_the_layers_that_use_it(family, fields, windows):
    assert read(config_json(family, **fields)).layer_windows == windows


@pytest.mark.parametrize(("family", "features"), [
    ("llama", (True, True, True, False)), ("mistral", (False, False, False, False)), ("qwen2", (True, False, False, False)),
    ("qwen3", (True, True, False, True))])
def test_a_family_says_which_biases_and_norms_there_are(family, features):
    config = read(config_json(family))
    assert (config.has_qkv_bias, config.has_output_bias, config.has_mlp_bias, config.has_qk_norm) == features


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_parameter_of_a_model_has_one_name_in_its_checkpoint(family):
    fields = {"rope_parameters": None} if family.name == "Gemma3" else {}
    config = read(config_json(family.name.lower(), **fields))
    rows = {}
    for name, spec in named_leaves(param_specs(config)):
        if (columns := family.columns_of(name)) is not None:  # every other row of a tensor, or all
            stored = f"{family.checkpoint_name(name)}, {columns.first} of {columns.every}"
            assert stored not in rows
            rows[stored, spec.stack.rows] = [(0, spec.stack.rows)]
            continue
        num_rows = spec.shape[0] if spec.stack is None else spec.stack.rows
        first, stop, total = family.row_range(name, config) or (0, num_rows, num_rows)
        assert stop - first == num_rows
        for tensor in family.checkpoint_names(name, spec.stack):
            rows.setdefault((tensor, total), []).append((first, stop))
    assert len({name for name, _ in rows}) == len(rows)
    assert any(name.startswith("model.layers.1.self_attn.q") for name, _ in rows)
    assert not any("{" in name for name, _ in rows)
    for (_, total), ranges in rows.items():  # side by side, and together the whole tensor
        ranges = sorted(ranges)
        assert [first for first, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
        assert ranges[-1][1] == total


def test_an_unknown_architecture_is_refused_with_those_known():
    with pytest.raises(ConfigError, match="unknown architecture MambaForCausalLM; known: LlamaForCausalLM, MistralForCausalLM, Qwen2"):
        find_family({"architectures": ["MambaForCausalLM"]})
    with pytest.raises(ConfigError, match=r"unknown architecture \(none given\)"):
        find_family({})


@pytest.mark.parametrize(("fields", "message"), [
    ({"hidden_size": None}, "hidden_size is missing"), ({"vocab_size": 0}, "vocab_size is 0; it must be a whole number of at least 1"),
    ({"vocab_size": "32000"}, "vocab_size is '32000'"), ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"intermediate_size": 1.5}, "intermediate_size is 1.5"), ({"num_attention_heads": None}, "num_attention_heads is missing"),
    ({"num_key_value_heads": 3}, "num_attention_heads 8 is no multiple of num_key_value_heads 3"),
    ({"hidden_size": 41, "head_dim": None}, "hidden_size 41 is no multiple of num_attention_heads 8, and head_dim is not given"),
    ({"head_dim": 7}, "head_dim 7 is odd; rope needs an even one"), ({"hidden_act": "mish"}, "unknown hidden_act 'mish'; known: silu"),
    ({"rope_parameters": {"rope_type": "ntk"}}, "unknown rope_type 'ntk'; known: default, linear, dynamic, llama3, yarn, longrope"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "short_factor is None; longrope needs a list"),
    ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1, 2, 3, 4], "long_factor": [1, 2, 3]}},
     "long_factor has 3 numbers; it must have 4"),
    ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1, 2, 3, -4], "long_factor": [1, 2, 3, 4]}},
     "short_factor is -4; it must be a number"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "rope factor 0.5 of rope_type 'linear' is below 1"),
    ({"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor 1.5 rotates 12 of head_dim 8"),
    ({"partial_rotary_factor": 0.4}, "partial_rotary_factor 0.4 rotates 3 of head_dim 8; it must be an even number"),
    ({"hidden_act": ["silu"]}, r"unknown hidden_act \['silu'\]"),
    ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000; it may be 10000 at most"), ({"head_dim": 10**400}, "head_dim is 10+; it may be"),
])
def test_a_config_that_cannot_be_run_is_refused_with_the_field_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        read(config_json("llama", **fields))


@pytest.mark.parametrize(("fields", "message"), [
    ({"rope_parameters": {"rope_type": "linear", "factor": "two"}}, "factor is 'two'; it must be a number above 0"),
    ({"rope_parameters": {"rope_type": "linear", "factor": math.nan}}, "factor is nan"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "32"}}, "beta_fast is '32'"),
    ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 0.5}}, "original_max_position_embeddings is 0.5"),
    ({"rope_parameters": "linear"}, "rope_parameters .* is 'linear'; it must be an object"),
    ({"rope_theta": "big", "rope_parameters": None}, "rope_theta is 'big'"), ({"rope_theta": 0, "rope_parameters": None}, "rope_theta is 0"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'"), ({"sliding_window": "wide"}, "sliding_window is 'wide'"),
    ({"sliding_window": 0}, "sliding_window is 0"), ({"max_window_layers": "4"}, "max_window_layers is '4'"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps is 10+; it must be a number above 0"),
    ({"layer_types": ["sliding_attention"]}, "layer_types is .* for each of the 2 layers"),
    ({"layer_types": ["sliding_attention", "linear_attention"]}, "layer_types is .*linear_attention"),
])
def test_a_field_of_the_wrong_type_or_range_is_refused_with_its_value(fields, message):
    with pytest.raises(ConfigError, match=message):
        read(config_json("mistral", **fields))
