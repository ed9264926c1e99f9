"""Gemma 2: Gemma with norms before and after each sublayer, soft caps, and a sliding window in every other layer."""
from tpllm.families import llama
from tpllm.families.family import Family
from tpllm.families.fields import optional_number, positive, positive_number
from tpllm.families.hf_config import activation, attention_biases, decoder_config, layer_types, refuse_bidirectional, sliding_windows

DEFAULTS = {
    **llama.DEFAULTS, "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "layer_types": None, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "use_bidirectional_attention": None,
}
WEIGHT_NAMES = {
    **llama.WEIGHT_NAMES,
    "layers.{i}.attn_post_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp_norm": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "layers.{i}.mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
}


def read_config(hf):
    refuse_bidirectional(hf)
    windows = sliding_windows(hf, layer_types(hf, slides=lambda layer: layer % 2 == 0))
    return decoder_config(hf, layer_windows=windows, attention_softcap=optional_number(hf, "attn_logit_softcapping"), **features(hf))


def features(hf):
    """What Gemma 2 and 3 have in common."""
    return {
        **attention_biases(hf), "activation": activation(hf, "hidden_activation"), "norm_offset": 1.0,
        "embedding_multiplier": positive(hf, "hidden_size") ** 0.5, "has_post_norm": True,
        "attention_scale": positive_number(hf, "query_pre_attn_scalar") ** -0.5, "logit_softcap": optional_number(hf, "final_logit_softcapping"),
    }


FAMILY = Family("Gemma2", ("Gemma2ForCausalLM",), read_config, WEIGHT_NAMES, model_type="gemma2", defaults=DEFAULTS)
