"""Qwen3: queries and keys RMS-normalized per head, a head dim that does not follow from the hidden size."""
from tpllm.families.family import Family
from tpllm.families.hf_config import decoder_config, sliding_windows
from tpllm.families.llama import WEIGHT_NAMES


def config_from_hf(hf):
    windows = sliding_windows({"max_window_layers": 28, **hf}, is_used=hf.get("use_sliding_window", False))
    has_bias = hf.get("attention_bias", False)
    return decoder_config({"head_dim": 128, **hf}, has_qk_norm=True, has_qkv_bias=has_bias, has_output_bias=has_bias,
                          layer_windows=windows)


FAMILY = Family("Qwen3", ("Qwen3ForCausalLM",), config_from_hf, WEIGHT_NAMES)
