"""Granite 3, dense: Llama with multipliers on embeddings, attention scores, residuals and logits."""
from tpllm.families import llama
from tpllm.families.family import Family
from tpllm.families.fields import flag, positive_number
from tpllm.families.hf_config import attention_biases, decoder_config

DEFAULTS = {**llama.DEFAULTS, "embedding_multiplier": 1.0, "attention_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}


def read_config(hf):
    return decoder_config(hf, **attention_biases(hf), has_mlp_bias=flag(hf, "mlp_bias"),
                          embedding_multiplier=positive_number(hf, "embedding_multiplier"),
                          attention_scale=positive_number(hf, "attention_multiplier"),
                          residual_multiplier=positive_number(hf, "residual_multiplier"), logit_scale=1 / positive_number(hf, "logits_scaling"))


FAMILY = Family("Granite", ("GraniteForCausalLM",), read_config, llama.WEIGHT_NAMES, model_type="granite", defaults=DEFAULTS)
