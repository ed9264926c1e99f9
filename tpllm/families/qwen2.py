"""Qwen2 and Qwen2.5: biases on queries, keys and values; a sliding window in the upper layers where switched on."""
from tpllm.families import llama
from tpllm.families.family import Family
from tpllm.families.fields import count
from tpllm.families.hf_config import decoder_config, windows_if_used

DEFAULTS = {
    **llama.DEFAULTS, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
}


def read_config(hf):
    windows = windows_if_used(hf, slides=lambda layer: layer >= count(hf, "max_window_layers"))
    return decoder_config(hf, has_qkv_bias=True, layer_windows=windows)


FAMILY = Family("Qwen2", ("Qwen2ForCausalLM",), read_config, llama.WEIGHT_NAMES, model_type="qwen2", defaults=DEFAULTS)
