"""Granite 3, dense: Llama with multipliers on embeddings, attention scores, residuals and logits."""
from tpllm.families.family import Family
from tpllm.families.hf_config import decoder_config, positive_number
from tpllm.families.llama import WEIGHT_NAMES


def config_from_hf(hf):
    has_bias = hf.get("attention_bias", False)
    return decoder_config(hf, has_qkv_bias=has_bias, has_output_bias=has_bias, has_mlp_bias=hf.get("mlp_bias", False),
                          embedding_multiplier=positive_number(hf, "embedding_multiplier", 1.0),
                          attention_scale=positive_number(hf, "attention_multiplier", 1.0),
                          residual_multiplier=positive_number(hf, "residual_multiplier", 1.0),
                          logit_scale=1 / positive_number(hf, "logits_scaling", 1.0))


FAMILY = Family("Granite", ("GraniteForCausalLM",), config_from_hf, WEIGHT_NAMES)
