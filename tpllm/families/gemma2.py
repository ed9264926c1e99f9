"""Gemma 2: Gemma with norms before and after each sublayer, soft caps, and a sliding window in every other layer."""
from tpllm.families.family import Family
from tpllm.families.hf_config import activation, decoder_config, layer_types, optional_number, positive, positive_number, sliding_windows
from tpllm.families.llama import WEIGHT_NAMES as LLAMA_NAMES

DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True, "max_position_embeddings": 8192, "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
WEIGHT_NAMES = {
    **LLAMA_NAMES,
    "layers.{i}.attn_post_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp_norm": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "layers.{i}.mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
}


def config_from_hf(hf):
    hf = {**DEFAULTS, **hf}
    hf["layer_types"] = layer_types(hf, full_every=2)
    return decoder_config(hf, layer_windows=sliding_windows(hf, is_used=True), attention_softcap=optional_number(hf, "attn_logit_softcapping"),
                          **features(hf))


def features(hf):
    """What Gemma 2 and 3 have in common."""
    has_bias = hf.get("attention_bias", False)
    return {
        "activation": activation(hf, "hidden_activation"), "norm_offset": 1.0, "embedding_multiplier": positive(hf, "hidden_size") ** 0.5,
        "has_post_norm": True, "has_qkv_bias": has_bias, "has_output_bias": has_bias,
        "attention_scale": positive_number(hf, "query_pre_attn_scalar") ** -0.5, "logit_softcap": optional_number(hf, "final_logit_softcapping"),
    }


FAMILY = Family("Gemma2", ("Gemma2ForCausalLM",), config_from_hf, WEIGHT_NAMES)
