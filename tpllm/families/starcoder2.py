"""StarCoder2: LayerNorm, an MLP without a gate, biases everywhere, a sliding window in every layer."""
from tpllm.families import llama
from tpllm.families.family import Family
from tpllm.families.fields import flag, positive_number
from tpllm.families.hf_config import decoder_config, window_everywhere

DEFAULTS = {
    **llama.DEFAULTS, "vocab_size": 49152, "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30, "num_attention_heads": 24,
    "num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 4096, "tie_word_embeddings": True, "norm_epsilon": 1e-5,
    "use_bias": True, "sliding_window": None,
}
WEIGHT_NAMES = {
    **llama.WEIGHT_NAMES,
    "layers.{i}.attn_norm_bias": "model.layers.{i}.input_layernorm.bias",
    "layers.{i}.mlp_norm_bias": "model.layers.{i}.post_attention_layernorm.bias",
    "layers.{i}.mlp.up": "model.layers.{i}.mlp.c_fc.weight",
    "layers.{i}.mlp.down": "model.layers.{i}.mlp.c_proj.weight",
    "layers.{i}.mlp.up_bias": "model.layers.{i}.mlp.c_fc.bias",
    "layers.{i}.mlp.down_bias": "model.layers.{i}.mlp.c_proj.bias",
    "final_norm_bias": "model.norm.bias",
}


def read_config(hf):
    has_bias = flag(hf, "use_bias")
    return decoder_config(hf, norm="layer", norm_eps=positive_number(hf, "norm_epsilon"), has_gated_mlp=False, has_qkv_bias=has_bias,
                          has_output_bias=has_bias, has_mlp_bias=has_bias, layer_windows=window_everywhere(hf))


FAMILY = Family("StarCoder2", ("Starcoder2ForCausalLM",), read_config, WEIGHT_NAMES, model_type="starcoder2", defaults=DEFAULTS)
