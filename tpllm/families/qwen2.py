"""Qwen2 and Qwen2.5: biases on queries, keys and values; a sliding window in the upper layers where switched on."""
from tpllm.families.family import Family
from tpllm.families.hf_config import decoder_config, sliding_windows
from tpllm.families.llama import WEIGHT_NAMES


def config_from_hf(hf):
    windows = sliding_windows({"max_window_layers": 28, **hf}, is_used=hf.get("use_sliding_window", False))
    return decoder_config(hf, has_qkv_bias=True, layer_windows=windows)


FAMILY = Family("Qwen2", ("Qwen2ForCausalLM",), config_from_hf, WEIGHT_NAMES)
