"""OLMo 2: norms after each sublayer and none before; queries and keys normalized over all heads together."""
from tpllm.families.family import Family
from tpllm.families.fields import flag
from tpllm.families.hf_config import decoder_config
from tpllm.families.llama import DEFAULTS as LLAMA_DEFAULTS
from tpllm.families.llama import WEIGHT_NAMES as LLAMA_NAMES

DEFAULTS = {**LLAMA_DEFAULTS, "vocab_size": 50304, "rms_norm_eps": 1e-5}
WEIGHT_NAMES = {
    **LLAMA_NAMES,
    "layers.{i}.attn_post_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
}


def read_config(hf):
    has_bias = flag(hf, "attention_bias")
    return decoder_config(hf, has_pre_norm=False, has_post_norm=True, has_qk_norm=True, qk_norm_spans_heads=True,
                          has_qkv_bias=has_bias, has_output_bias=has_bias)


FAMILY = Family("OLMo2", ("Olmo2ForCausalLM",), read_config, WEIGHT_NAMES, model_type="olmo2", defaults=DEFAULTS)
