"""Qwen3: queries and keys RMS-normalized per head, a head dim that does not follow from the hidden size."""
from tpllm.families.family import Family
from tpllm.families.fields import count, flag
from tpllm.families.hf_config import decoder_config, windows_if_used
from tpllm.families.llama import WEIGHT_NAMES
from tpllm.families.qwen2 import DEFAULTS as QWEN2_DEFAULTS

DEFAULTS = {**QWEN2_DEFAULTS, "head_dim": 128}


def read_config(hf):
    has_bias, windows = flag(hf, "attention_bias"), windows_if_used(hf, slides=lambda layer: layer >= count(hf, "max_window_layers"))
    return decoder_config(hf, has_qk_norm=True, has_qkv_bias=has_bias, has_output_bias=has_bias, layer_windows=windows)


FAMILY = Family("Qwen3", ("Qwen3ForCausalLM",), read_config, WEIGHT_NAMES, model_type="qwen3", defaults=DEFAULTS)
