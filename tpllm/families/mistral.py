"""Mistral 7B and its successors: Llama's layout with an optional sliding window in every layer."""
from tpllm.families import llama
from tpllm.families.family import Family
from tpllm.families.hf_config import decoder_config, window_everywhere

DEFAULTS = {**llama.DEFAULTS, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}


def read_config(hf):
    return decoder_config(hf, layer_windows=window_everywhere(hf))


FAMILY = Family("Mistral", ("MistralForCausalLM",), read_config, llama.WEIGHT_NAMES, model_type="mistral", defaults=DEFAULTS)
