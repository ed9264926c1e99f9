"""Mistral 7B and its successors: Llama's layout with an optional sliding window in every layer."""
from tpllm.families.family import Family
from tpllm.families.hf_config import decoder_config, sliding_windows
from tpllm.families.llama import WEIGHT_NAMES


def config_from_hf(hf):
    return decoder_config(hf, layer_windows=sliding_windows(hf, is_used=True))


FAMILY = Family("Mistral", ("MistralForCausalLM",), config_from_hf, WEIGHT_NAMES)
