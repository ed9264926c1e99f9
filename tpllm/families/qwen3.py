"""Qwen3: queries and keys RMS-normalized per head, a head dim that does not follow from the hidden size."""
from tpllm.families import llama, qwen2
from tpllm.families.family import Family
from tpllm.families.fields import count
from tpllm.families.hf_config import attention_biases, decoder_config, windows_if_used

DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128}


def read_config(hf):
    return decoder_config(hf, has_qk_norm=True, **attention_biases(hf),
                          layer_windows=windows_if_used(hf, slides=lambda layer: layer >= count(hf, "max_window_layers")))


FAMILY = Family("Qwen3", ("Qwen3ForCausalLM",), read_config, llama.WEIGHT_NAMES, model_type="qwen3", defaults=DEFAULTS)
