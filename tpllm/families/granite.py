"""Granite 3, dense: Llama with multipliers on embeddings, attention scores, residuals and logits."""
from tpllm.families.family import Family
from tpllm.families.fields import flag, positive_number
from tpllm.families.hf_config import decoder_config
from tpllm.families.llama import DEFAULTS as LLAMA_DEFAULTS
from tpllm.families.llama import WEIGHT_NAMES

DEFAULTS = {**LLAMA_DEFAULTS, "embedding_multiplier": 1.0, "attention_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}


def read_config(hf):
    has_bias = flag(hf, "attention_bias")
    return decoder_config(hf, has_qkv_bias=has_bias, has_output_bias=has_bias, has_mlp_bias=flag(hf, "mlp_bias"),
                          embedding_multiplier=positive_number(hf, "embedding_multiplier"),
                          attention_scale=positive_number(hf, "attention_multiplier"),
                          residual_multiplier=positive_number(hf, "residual_multiplier"), logit_scale=1 / positive_number(hf, "logits_scaling"))


FAMILY = Family("Granite", ("GraniteForCausalLM",), read_config, WEIGHT_NAMES, model_type="granite", defaults=DEFAULTS)
