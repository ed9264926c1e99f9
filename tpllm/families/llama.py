"""Llama 2, 3, 3.1, 3.2, 3.3, Code Llama, TinyLlama and everything saved as ``LlamaForCausalLM``."""
from tpllm.families.family import Family
from tpllm.families.fields import flag
from tpllm.families.hf_config import attention_biases, decoder_config

WEIGHT_NAMES = {
    "embed": "model.embed_tokens.weight",
    "layers.{i}.attn_norm": "model.layers.{i}.input_layernorm.weight",
    "layers.{i}.attn.q": "model.layers.{i}.self_attn.q_proj.weight",
    "layers.{i}.attn.k": "model.layers.{i}.self_attn.k_proj.weight",
    "layers.{i}.attn.v": "model.layers.{i}.self_attn.v_proj.weight",
    "layers.{i}.attn.o": "model.layers.{i}.self_attn.o_proj.weight",
    "layers.{i}.attn.q_bias": "model.layers.{i}.self_attn.q_proj.bias",
    "layers.{i}.attn.k_bias": "model.layers.{i}.self_attn.k_proj.bias",
    "layers.{i}.attn.v_bias": "model.layers.{i}.self_attn.v_proj.bias",
    "layers.{i}.attn.o_bias": "model.layers.{i}.self_attn.o_proj.bias",
    "layers.{i}.attn.q_norm": "model.layers.{i}.self_attn.q_norm.weight",
    "layers.{i}.attn.k_norm": "model.layers.{i}.self_attn.k_norm.weight",
    "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp.gate": "model.layers.{i}.mlp.gate_proj.weight",
    "layers.{i}.mlp.up": "model.layers.{i}.mlp.up_proj.weight",
    "layers.{i}.mlp.down": "model.layers.{i}.mlp.down_proj.weight",
    "layers.{i}.mlp.gate_bias": "model.layers.{i}.mlp.gate_proj.bias",
    "layers.{i}.mlp.up_bias": "model.layers.{i}.mlp.up_proj.bias",
    "layers.{i}.mlp.down_bias": "model.layers.{i}.mlp.down_proj.bias",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}


DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "rope_theta": 10000.0, "rope_parameters": None, "rope_scaling": None, "attention_bias": False, "mlp_bias": False,
}


def read_config(hf):
    return decoder_config(hf, **attention_biases(hf), has_mlp_bias=flag(hf, "mlp_bias"))


FAMILY = Family("Llama", ("LlamaForCausalLM",), read_config, WEIGHT_NAMES, model_type="llama", defaults=DEFAULTS)
