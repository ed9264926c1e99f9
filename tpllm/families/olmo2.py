"""OLMo 2: norms after each sublayer and none before; queries and keys normalized over all heads together."""
from tpllm.families import llama
from tpllm.families.family import Family
from tpllm.families.hf_config import attention_biases, decoder_config

DEFAULTS = {**llama.DEFAULTS, "vocab_size": 50304, "rms_norm_eps": 1e-5}
WEIGHT_NAMES = {
    **llama.WEIGHT_NAMES,
    "layers.{i}.attn_post_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
}


def read_config(hf):
    return decoder_config(hf, has_pre_norm=False, has_post_norm=True, has_qk_norm=True, qk_norm_spans_heads=True, **attention_biases(hf))


FAMILY = Family("OLMo2", ("Olmo2ForCausalLM",), read_config, WEIGHT_NAMES, model_type="olmo2", defaults=DEFAULTS)
