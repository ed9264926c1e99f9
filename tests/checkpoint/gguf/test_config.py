"""Metadata of GGUF files as config.json, and the names of tensors."""
import numpy as np
import pytest

from tests.support.gguf_files import gguf_tensor_name, random_weights, raw_model
from tests.support.tiny_models import config_json
from tpllm.checkpoint.gguf.config import ARCHITECTURES, config_from_gguf
from tpllm.checkpoint.gguf.header import open_gguf
from tpllm.checkpoint.gguf.names import gguf_name, gguf_weight_names
from tpllm.checkpoint.gguf.rope import llama3_factors
from tpllm.errors import CheckpointError
from tpllm.families.llama import WEIGHT_NAMES
from tpllm.families.registry import find_family

SIZES = {"block_count": 2, "context_length": 4096, "embedding_length": 64, "feed_forward_length": 96, "attention.head_count": 8,
         "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5}
LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA32 = {**LLAMA31, "factor": 32.0}


def read(tmp_path, arch: str = "llama", *, tensors=(), without=(), **fields):
    metadata = {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in {**SIZES, **fields}.items() if key not in without}}
    every = {"token_embd.weight": np.zeros((11, 64), np.float32), "output_norm.weight": np.ones(64, np.float32), **dict(tensors)}
    (tmp_path / "model.gguf").write_bytes(raw_model(metadata, every))
    return config_from_gguf(open_gguf(tmp_path / "model.gguf"))


def test_a_llama_has_the_fields_of_its_config_json(tmp_path):
    expected = {"architectures": ["LlamaForCausalLM"], "vocab_size": 11, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                "rope_theta": 500000.0, "tie_word_embeddings": True, "attention_bias": False, "torch_dtype": "float32"}
    found = read(tmp_path, **{"rope.freq_base": 500000.0})
    assert {key: found[key] for key in expected} == expected
    assert not read(tmp_path, tensors={"output.weight": np.zeros((11, 64), np.float32)})["tie_word_embeddings"]
    assert read(tmp_path, **{"attention.key_length": 16, "attention.value_length": 16})["head_dim"] == 16
    assert read(tmp_path, tensors={"blk.0.attn_q.bias": np.zeros(64, np.float32)})["attention_bias"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_named(tmp_path, arch):
    more = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32} if "moe" in arch or arch == "gpt-oss" else {}
    more |= {"attention.sliding_window": 512} if arch == "gemma3" else {}
    found = read(tmp_path, arch, **more)
    assert found["architectures"] == [ARCHITECTURES[arch][0]]
    assert "moe" not in arch or (found["num_experts"], found["num_experts_per_tok"], found["moe_intermediate_size"]) == (4, 2, 32)


def test_windows_and_caps_of_gemma(tmp_path):
    found = read(tmp_path, "gemma2", **{"attention.sliding_window": 512, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0})
    assert found["layer_types"] == ["sliding_attention", "full_attention"]
    assert (found["attn_logit_softcapping"], found["final_logit_softcapping"], found["sliding_window"]) == (50.0, 30.0, 512)
    assert found["hidden_activation"] == "gelu_pytorch_tanh"
    blocks = {f"blk.{i}.attn_norm.weight": np.ones(64, np.float32) for i in range(7)}
    found = read(tmp_path, "gemma3", tensors=blocks, block_count=7, **{"attention.sliding_window": 512, "rope.freq_base": 1e6})
    assert [kind == "full_attention" for kind in found["layer_types"]] == [False] * 5 + [True, False]
    assert (found["rope_theta"], found["rope_local_base_freq"]) == (1e6, 10000.0)


def test_gpt_oss_has_windows_in_every_other_layer_and_bounds_of_yarn_that_are_not_rounded(tmp_path):
    experts = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32, "block_count": 3, "attention.sliding_window": 96}
    norms = {f"blk.{i}.attn_norm.weight": np.ones(64, np.float32) for i in range(3)}
    found = read(tmp_path, "gpt-oss", tensors=norms, **experts)
    assert found["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert (found["sliding_window"], found["num_local_experts"], found["num_experts_per_tok"], found["intermediate_size"]) == (96, 4, 2, 32)
    config = find_family(found).config_from_hf(found)
    assert (config.rope.kind, config.has_qkv_bias, config.layer_windows) == ("default", False, (96, None, 96))
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 4096}
    found = read(tmp_path, "gpt-oss", tensors={**norms, "blk.0.attn_q.bias": np.zeros(64, np.float32)}, **experts, **yarn)
    assert (found["rope_scaling"]["truncate"], found["rope_scaling"]["factor"], found["attention_bias"]) == (False, 32.0, True)
    assert not find_family(found).config_from_hf(found).rope.truncate


def test_experts_of_a_llama_make_it_a_mixtral_and_a_window_a_mistral(tmp_path):
    found = read(tmp_path, expert_count=8, expert_used_count=2)
    assert (found["architectures"], found["num_local_experts"], found["num_experts_per_tok"]) == (["MixtralForCausalLM"], 8, 2)
    found = read(tmp_path, **{"attention.sliding_window": 4096})
    assert (found["architectures"], found["sliding_window"]) == (["MistralForCausalLM"], 4096)


def model_of(found):
    return find_family(found).config_from_hf(found)


def test_a_count_of_zero_means_none_as_llama_cpp_reads_it(tmp_path):
    none = {"attention.sliding_window": 0, "expert_count": 0, "expert_used_count": 0}
    found = read(tmp_path, **none)
    assert (found["architectures"], model_of(found).layer_windows) == (["LlamaForCausalLM"], (None, None))
    for arch in ("phi3", "qwen2", "qwen3", "gemma2", "gemma3"):
        assert model_of(read(tmp_path, arch, **none)).layer_windows == (None, None), arch
    assert model_of(read(tmp_path, "phi3", **{"attention.sliding_window": 7})).layer_windows == (7, 7)
    assert model_of(read(tmp_path, "phi3")).layer_windows == (None, None)
    assert model_of(read(tmp_path, "gemma2")).layer_windows == (4096, None)  # left out, it is what llama.cpp takes
    experts = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 0, "expert_shared_feed_forward_length": 0}
    config = model_of(read(tmp_path, "qwen2moe", **none | experts))
    assert (config.expert_size, config.shared_expert_size, config.layer_windows) == (48, 96, (None, None))
    config = model_of(read(tmp_path, "qwen3moe", **{**experts, "expert_feed_forward_length": 24, "feed_forward_length": 0}))
    assert (config.expert_size, config.intermediate_size) == (24, 24)
    caps = model_of(read(tmp_path, "gemma2", attn_logit_softcapping=0.0, final_logit_softcapping=0.0))
    assert (caps.attention_softcap, caps.logit_softcap) == (None, None)
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 0}
    assert model_of(read(tmp_path, **yarn)).rope.original_max_position == 4096


def test_what_a_file_leaves_out_is_what_llama_cpp_takes(tmp_path):
    assert {arch: model_of(read(tmp_path, arch, **{"attention.sliding_window": 8})).rope.theta for arch in ("llama", "qwen2", "gemma3")} == {
        "llama": 1e4, "qwen2": 1e4, "gemma3": 1e4}
    gemma2 = model_of(read(tmp_path, "gemma2"))
    assert (gemma2.attention_softcap, gemma2.logit_softcap) == (50.0, 30.0)
    assert model_of(read(tmp_path, without=("attention.head_count_kv",))).num_kv_heads == 8
    for window in ({}, {"attention.sliding_window": 0}):  # Gemma 3 without a window: full attention everywhere, with its rope
        gemma3 = model_of(read(tmp_path, "gemma3", **{"rope.freq_base": 1e6, **window}))
        assert (gemma3.layer_windows, [rope.theta for rope in gemma3.layer_ropes]) == ((None, None), [1e6, 1e6])


@pytest.mark.parametrize("rule", [LLAMA31, LLAMA32, {**LLAMA31, "factor": 16.0, "original_max_position_embeddings": 4096},
                                  {**LLAMA31, "high_freq_factor": 2.5, "original_max_position_embeddings": 6000}])
def test_the_rule_of_llama3_is_found_again_from_its_factors(tmp_path, rule):
    factors = llama3_factors(rule, 500000.0, 64).astype(np.float32)
    found = read(tmp_path, tensors={"rope_freqs.weight": factors},
                 **{"rope.freq_base": 500000.0, "attention.key_length": 64, "attention.value_length": 64})["rope_scaling"]
    assert found.keys() == rule.keys()
    assert {key: value for key, value in found.items() if isinstance(value, float | int)} == pytest.approx(
        {key: value for key, value in rule.items() if key != "rope_type"}, rel=1e-3)


def test_factors_of_another_rule_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight follow no rule"):
        read(tmp_path, tensors={"rope_freqs.weight": np.array([1, 3, 1, 2], np.float32)})


def test_other_rope_rules(tmp_path):
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    assert read(tmp_path, **scaling)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    scaling = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 1024}
    assert read(tmp_path, **scaling)["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert "rope_scaling" not in read(tmp_path, **{"rope.scaling.type": "none"})
    factors = {f"rope_factors_{kind}.weight": np.full(4, value, np.float32) for kind, value in (("long", 2), ("short", 1))}
    found = read(tmp_path, "phi3", tensors=factors, **{"rope.scaling.original_context_length": 512, "rope.scaling.attn_factor": 1.25})
    assert found["rope_scaling"] == {"rope_type": "longrope", "type": "longrope", "long_factor": [2.0] * 4, "short_factor": [1.0] * 4,
                                     "attention_factor": 1.25}
    assert found["original_max_position_embeddings"] == 512
    with pytest.raises(CheckpointError, match=r"rope\.scaling\.type is 'ntk'"):
        read(tmp_path, **{"rope.scaling.type": "ntk", "rope.scaling.factor": 2.0})


@pytest.mark.parametrize(("fields", "message"), [
    ({"block_count": 2**31}, r"block_count is 2147483648; it must be a whole number of 1 to"),
    ({"block_count": 100}, r"block_count is 100; the file has 2 tensors"),
    ({"embedding_length": "64"}, r"embedding_length is '64'"),
    ({"attention.head_count": [8, 4]}, r"head_count is .*the same in every layer"),
    ({"attention.layer_norm_rms_epsilon": float("nan")}, r"epsilon is nan; it must be a finite number"),
    ({"rope.freq_base": 0.0}, r"freq_base is 0\.0; it must be at least 1"),
    ({"attention.value_length": 4}, r"value_length is 4 and key_length 8"),
    ({"block_count": 0}, r"block_count is 0"), ({"attention.head_count": 0}, r"head_count is 0"), ({"attention.key_length": 0}, r"key_length is 0"),
    ({"feed_forward_length": 0}, r"feed_forward_length is missing"), ({"attention.sliding_window": True}, r"sliding_window is True"),
    ({"expert_count": 4, "expert_used_count": 0}, r"expert_used_count is 0"),
])
def test_a_value_that_cannot_be_is_refused_by_its_key(tmp_path, fields, message):
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, **fields)


@pytest.mark.parametrize("key", ["block_count", "context_length", "embedding_length", "attention.head_count", "attention.layer_norm_rms_epsilon"])
def test_a_missing_key_is_named(tmp_path, key):
    with pytest.raises(CheckpointError, match=rf"llama\.{key} is missing"):
        read(tmp_path, without=(key,))


def test_an_architecture_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"architecture is 'mamba', which is not known; known: llama"):
        read(tmp_path, "mamba")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_names_are_those_of_the_converter(family):
    hf = config_json(family)
    assert all(gguf_name(name, family) == gguf_tensor_name(name) for name in random_weights(hf) if "bias" not in name or "mlp" not in name)
    names = gguf_weight_names(find_family(hf).weight_names, family)
    assert names["layers.{i}.attn.q"] == "blk.{i}.attn_q.weight"
    assert names["head"] == "output.weight"
    assert set(names) == set(find_family(hf).weight_names)


def test_names_of_other_architectures():
    assert WEIGHT_NAMES["layers.{i}.mlp_norm"] == "model.layers.{i}.post_attention_layernorm.weight"
    assert gguf_name("model.layers.3.post_attention_layernorm.weight", "llama") == "blk.3.ffn_norm.weight"
    assert gguf_name("model.layers.3.post_attention_layernorm.weight", "gemma2") == "blk.3.post_attention_norm.weight"
    assert gguf_name("model.layers.3.pre_feedforward_layernorm.weight", "gemma3") == "blk.3.ffn_norm.weight"
    assert gguf_name("model.layers.3.self_attn.qkv_proj.weight", "phi3") == "blk.3.attn_qkv.weight"
    assert gguf_name("model.layers.3.mlp.experts.5.down_proj.weight", "qwen3moe") == "blk.3.ffn_down_exps.weight"
    assert gguf_name("model.layers.3.block_sparse_moe.experts.5.w3.weight", "llama") == "blk.3.ffn_up_exps.weight"
    assert gguf_name("model.layers.3.mlp.gate.weight", "qwen2moe") == "blk.3.ffn_gate_inp.weight"
    assert gguf_name("vision.patch.weight", "llama") is None
    names = gguf_weight_names(find_family({"architectures": ["GptOssForCausalLM"]}).weight_names, "gpt-oss")
    assert names["layers.{i}.mlp_norm"] == "blk.{i}.post_attention_norm.weight"
    assert names["layers.{i}.attn.sinks"] == "blk.{i}.attn_sinks.weight"
    assert (names["layers.{i}.mlp.router"], names["layers.{i}.mlp.router_bias"]) == ("blk.{i}.ffn_gate_inp.weight", "blk.{i}.ffn_gate_inp.bias")
    for part in ("gate", "up", "down"):
        assert names[f"layers.{{i}}.mlp.experts.{part}"] == f"blk.{{i}}.ffn_{part}_exps.weight"
        assert names[f"layers.{{i}}.mlp.experts.{part}_bias"] == f"blk.{{i}}.ffn_{part}_exps.bias"
