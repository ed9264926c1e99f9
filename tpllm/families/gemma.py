"""Gemma 1 and CodeGemma: norms that scale by 1 + weight, embeddings times the root of the hidden size."""
from tpllm.families import llama
from tpllm.families.family import Family
from tpllm.families.fields import positive
from tpllm.families.hf_config import activation, attention_biases, decoder_config, refuse_bidirectional

DEFAULTS = {
    **llama.DEFAULTS, "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 16, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "tie_word_embeddings": True,
    "use_bidirectional_attention": None,
}


def read_config(hf):
    refuse_bidirectional(hf)
    if hf["hidden_act"] == "gelu":  # in the first releases; it means the tanh approximation that the models were trained with
        hf = {**hf, "hidden_act": "gelu_pytorch_tanh"}
    return decoder_config(hf, **attention_biases(hf), activation=activation(hf, "hidden_act"), norm_offset=1.0,
                          embedding_multiplier=positive(hf, "hidden_size") ** 0.5)


FAMILY = Family("Gemma", ("GemmaForCausalLM",), read_config, llama.WEIGHT_NAMES, model_type="gemma", defaults=DEFAULTS)
