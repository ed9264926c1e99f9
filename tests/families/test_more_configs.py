"""Reading config.json of the families that have features of their own: fields of released models, defaults, refusals."""
import dataclasses
import math

import pytest

from pallas_kernels.gated_mlp import ClampedGlu
from tests.support.tiny_models import config_json
from tpllm.errors import ConfigError
from tpllm.families.registry import find_family
from tpllm.model.config import ModelConfig, RopeConfig

LONG = [1.0 + 0.5 * i for i in range(48)]
SHORT = [1.0] * 48


def read(hf):
    return find_family(hf).config_from_hf(hf)


def test_a_gemma_2_config_reads_field_by_field():
    hf = {"architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
          "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584,
          "intermediate_size": 14336, "max_position_embeddings": 8192, "num_attention_heads": 16, "num_hidden_layers": 42,
          "num_key_value_heads": 8, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
          "vocab_size": 256000}
    assert read(hf) == ModelConfig(
        vocab_size=256000, hidden_size=3584, num_layers=42, num_heads=16, num_kv_heads=8, head_dim=256, intermediate_size=14336, max_position=8192,
        activation="gelu_tanh", norm_eps=1e-6, norm_offset=1.0, ties_embeddings=True, has_post_norm=True, embedding_multiplier=math.sqrt(3584),
        attention_scale=1 / 16, attention_softcap=50.0, logit_softcap=30.0, layer_windows=(4096, None) * 21)


GEMMA_3 = {"architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256,
           "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768,
           "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
           "sliding_window": 512, "vocab_size": 262144}


@pytest.mark.parametrize(("rope_fields", "factor"), [
    ({"rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None, "sliding_window_pattern": 6}, None), ({}, None),
    ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 8.0),
    ({"rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                          "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}}, 8.0)])
def test_gemma_3_has_a_rope_rule_for_each_kind_of_layer_in_every_way_it_was_written(rope_fields, factor):
    config = read({**GEMMA_3, **rope_fields})
    full = RopeConfig(theta=1e6) if factor is None else RopeConfig(kind="linear", theta=1e6, factor=factor, original_max_position=32768)
    local = RopeConfig(theta=1e4)
    assert config.layer_ropes == ((local,) * 5 + (full,)) * 4 + (local,) * 2
    assert config.layer_windows == ((512,) * 5 + (None,)) * 4 + (512,) * 2
    assert (config.has_qk_norm, config.max_position, config.attention_softcap, config.ties_embeddings) == (True, 32768, None, True)


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_a_phi_4_mini_config_reads_with_its_longrope_under_each_of_its_names(kind):
    hf = {"architectures": ["Phi3ForCausalLM"], "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
          "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "num_attention_heads": 24, "num_hidden_layers": 32,
          "num_key_value_heads": 8, "partial_rotary_factor": 0.75, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 262144,
          "tie_word_embeddings": True, "vocab_size": 200064, "rope_scaling": {"type": kind, "short_factor": SHORT, "long_factor": LONG}}
    config = read(hf)
    assert config.rope == RopeConfig(kind="longrope", factor=32.0, original_max_position=4096, partial_rotary_factor=0.75,
                                     short_factors=tuple(SHORT), long_factors=tuple(LONG))
    assert (config.rope.rotary_dim(config.head_dim), config.max_position, config.ties_embeddings) == (96, 131072, True)
    family, D = find_family(hf), 128
    assert family.row_range("layers.3.attn.q", config) == (0, 24 * D, 40 * D)
    assert family.row_range("layers.3.attn.k", dataclasses.replace(config, kv_repeat=3)) == (24 * D, 32 * D, 40 * D)
    assert family.row_range("layers.0.attn.v", config) == (32 * D, 40 * D, 40 * D)
    assert family.row_range("layers.31.mlp.up", config) == (8192, 16384, 16384)
    assert family.row_range("layers.3.attn.o", config) is None
    assert family.row_range("embed", config) is None


def test_a_granite_config_reads_its_multipliers():
    config = read(config_json("granite", embedding_multiplier=12.0, attention_multiplier=0.0078125, residual_multiplier=0.22, logits_scaling=16.0))
    assert (config.embedding_multiplier, config.attention_scale, config.residual_multiplier, config.logit_scale) == (12.0, 0.0078125, 0.22, 1 / 16)


@pytest.mark.parametrize(("fields", "has_rope"), [({}, (True, False, True)), ({"no_rope_layers": [0, 1, 1]}, (False, True, True))])
def test_smollm3_rotates_nothing_in_some_layers(fields, has_rope):
    config = read(config_json("smollm3", **fields))
    assert tuple(rope is not None for rope in config.layer_ropes) == has_rope
    assert config.layer_windows == (None,) * 3


GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002, "experts_per_token": 4,
    "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096, "initializer_range": 0.02,
    "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
    "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
    "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
    "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
                            "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                                            "rope_type": "yarn", "truncate": False},
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
    "use_cache": True, "vocab_size": 201088}


def test_a_gpt_oss_config_reads_field_by_field_and_needs_few_of_them():
    rope = RopeConfig(kind="yarn", theta=150000.0, factor=32.0, original_max_position=4096, truncate=False)
    expected = ModelConfig(
        vocab_size=201088, hidden_size=2880, num_layers=24, num_heads=64, num_kv_heads=8, head_dim=64, intermediate_size=2880, max_position=131072,
        activation=ClampedGlu(7.0, 1.702), norm_eps=1e-5, rope=rope, has_qkv_bias=True, has_output_bias=True, has_router_bias=True,
        has_expert_bias=True, has_sinks=True, num_experts=32, num_experts_per_token=4, expert_size=2880, layer_windows=(128, None) * 12)
    assert read(GPT_OSS_20B) == expected
    few = {key: GPT_OSS_20B[key] for key in ("architectures", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
                                             "num_key_value_heads", "num_local_experts", "vocab_size")}
    assert read(few) == expected


def test_a_falcon_3_config_is_that_of_a_llama_with_its_own_head_dim():
    hf = {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "head_dim": 256, "hidden_act": "silu", "hidden_size": 3072,
          "intermediate_size": 23040, "max_position_embeddings": 32768, "mlp_bias": False, "num_attention_heads": 12, "num_hidden_layers": 28,
          "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000042, "tie_word_embeddings": False,
          "vocab_size": 131072}
    config = read(hf)
    assert (config.head_dim, config.num_kv_heads, config.rope) == (256, 4, RopeConfig(theta=1000042.0))


def test_what_a_family_leaves_out_of_its_file_has_the_defaults_of_transformers():
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    gemma2 = read({"architectures": ["Gemma2ForCausalLM"], **sizes})
    assert (gemma2.head_dim, gemma2.attention_softcap, gemma2.logit_softcap, gemma2.layer_windows) == (256, 50.0, 30.0, (4096, None))
    starcoder2 = read({"architectures": ["Starcoder2ForCausalLM"], **sizes})
    assert (starcoder2.num_kv_heads, starcoder2.norm, starcoder2.has_gated_mlp, starcoder2.has_mlp_bias) == (2, "layer", False, True)
    assert read({"architectures": ["GemmaForCausalLM"], **sizes, "num_key_value_heads": 4, "hidden_act": "gelu"}).activation == "gelu_tanh"


@pytest.mark.parametrize(("family", "fields", "message"), [
    ("gemma2", {"attn_logit_softcapping": -1}, "attn_logit_softcapping is -1; it must be a number above 0"),
    ("gemma2", {"final_logit_softcapping": "30"}, "final_logit_softcapping is '30'"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
    ("gemma2", {"hidden_activation": "mish"}, "unknown hidden_activation 'mish'"), ("gemma2", {"layer_types": ["full_attention"]}, "layer_types is"),
    ("gemma2", {"layer_types": [["full_attention"], 1]}, "layer_types is"), ("gemma2", {"sliding_window": 0}, "sliding_window is 0"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true; only causal"),
    ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters is .*; it must hold an object for full_attention"),
    ("gemma3", {"rope_parameters": "linear"}, "rope_parameters is 'linear'"),
    ("gemma3", {"rope_parameters": None, "rope_local_base_freq": 0}, "rope_local_base_freq is 0"),
    ("gemma3", {"rope_parameters": None, "sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
    ("granite", {"residual_multiplier": None, "embedding_multiplier": "x"}, "embedding_multiplier is 'x'"),
    ("granite", {"logits_scaling": 0}, "logits_scaling is 0"), ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers is \[1\]"),
    ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"), ("starcoder2", {"norm_epsilon": 0}, "norm_epsilon is 0"),
    ("gpt-oss", {"swiglu_limit": 0}, "swiglu_limit is 0; it must be a number above 0"),
    ("gpt-oss", {"layer_types": ["full_attention"]}, "layer_types is"), ("gpt-oss", {"num_experts_per_tok": 7}, "num_experts_per_tok is 7"),
    ("phi3", {"rope_parameters": {"rope_type": "su", "long_factor": [1.0] * 4}}, "short_factor is None; longrope needs a list"),
])
def test_a_config_that_cannot_be_run_is_refused_with_the_field_named(family, fields, message):
    with pytest.raises(ConfigError, match=message):
        read(config_json(family, **fields))
