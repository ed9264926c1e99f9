"""OLMo 2: norms after each sublayer and none before; queries and keys normalized over all heads together."""
from tpllm.families.family import Family
from tpllm.families.hf_config import decoder_config
from tpllm.families.llama import WEIGHT_NAMES as LLAMA_NAMES

WEIGHT_NAMES = {
    **LLAMA_NAMES,
    "layers.{i}.attn_post_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
}


def config_from_hf(hf):
    has_bias = hf.get("attention_bias", False)
    return decoder_config({"rms_norm_eps": 1e-5, **hf}, has_pre_norm=False, has_post_norm=True, has_qk_norm=True, qk_norm_spans_heads=True,
                          has_qkv_bias=has_bias, has_output_bias=has_bias)


FAMILY = Family("OLMo2", ("Olmo2ForCausalLM",), config_from_hf, WEIGHT_NAMES)
