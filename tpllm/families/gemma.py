"""Gemma 1 and CodeGemma: norms that scale by 1 + weight, embeddings times the root of the hidden size."""
from tpllm.families.family import Family
from tpllm.families.hf_config import activation, decoder_config, positive
from tpllm.families.llama import WEIGHT_NAMES

DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True, "max_position_embeddings": 8192, "hidden_act": "gelu_pytorch_tanh"}


def config_from_hf(hf):
    hf = {**DEFAULTS, **hf}
    hf["hidden_act"] = hf.get("hidden_activation") or hf["hidden_act"]
    if hf["hidden_act"] == "gelu":  # in the first releases; it means the tanh approximation that the models were trained with
        hf["hidden_act"] = "gelu_pytorch_tanh"
    has_bias = hf.get("attention_bias", False)
    return decoder_config(hf, activation=activation(hf, "hidden_act"), norm_offset=1.0, embedding_multiplier=positive(hf, "hidden_size") ** 0.5,
                          has_qkv_bias=has_bias, has_output_bias=has_bias)


FAMILY = Family("Gemma", ("GemmaForCausalLM",), config_from_hf, WEIGHT_NAMES)
