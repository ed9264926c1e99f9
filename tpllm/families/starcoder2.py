"""StarCoder2: LayerNorm, an MLP without a gate, biases everywhere, a sliding window in every layer."""
from tpllm.families.family import Family
from tpllm.families.hf_config import decoder_config, positive_number, sliding_windows
from tpllm.families.llama import WEIGHT_NAMES as LLAMA_NAMES

DEFAULTS = {"num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 4096, "tie_word_embeddings": True}
WEIGHT_NAMES = {
    **LLAMA_NAMES,
    "layers.{i}.attn_norm_bias": "model.layers.{i}.input_layernorm.bias",
    "layers.{i}.mlp_norm_bias": "model.layers.{i}.post_attention_layernorm.bias",
    "layers.{i}.mlp.up": "model.layers.{i}.mlp.c_fc.weight",
    "layers.{i}.mlp.down": "model.layers.{i}.mlp.c_proj.weight",
    "layers.{i}.mlp.up_bias": "model.layers.{i}.mlp.c_fc.bias",
    "layers.{i}.mlp.down_bias": "model.layers.{i}.mlp.c_proj.bias",
    "final_norm_bias": "model.norm.bias",
}


def config_from_hf(hf):
    hf = {**DEFAULTS, **hf}
    has_bias = hf.get("use_bias", True)
    return decoder_config(hf, norm="layer", norm_eps=positive_number(hf, "norm_epsilon", 1e-5), has_gated_mlp=False, has_qkv_bias=has_bias,
                          has_output_bias=has_bias, has_mlp_bias=has_bias, layer_windows=sliding_windows(hf, is_used=True))


FAMILY = Family("StarCoder2", ("Starcoder2ForCausalLM",), config_from_hf, WEIGHT_NAMES)
