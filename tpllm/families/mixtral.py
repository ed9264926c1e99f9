"""Mixtral: Mistral's attention, and experts in every layer."""
from tpllm.families.family import Family
from tpllm.families.hf_config import decoder_config, expert_features, sliding_windows
from tpllm.families.llama import WEIGHT_NAMES as LLAMA_NAMES

DEFAULTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 131072}
WEIGHT_NAMES = {
    **LLAMA_NAMES,
    "layers.{i}.mlp.router": "model.layers.{i}.block_sparse_moe.gate.weight",
    "layers.{i}.mlp.experts.gate": "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight",
    "layers.{i}.mlp.experts.up": "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight",
    "layers.{i}.mlp.experts.down": "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight",
}


def config_from_hf(hf):
    hf = {**DEFAULTS, **hf}
    return decoder_config(hf, layer_windows=sliding_windows(hf, is_used=True), **expert_features(hf, expert_size="intermediate_size"))


FAMILY = Family("Mixtral", ("MixtralForCausalLM",), config_from_hf, WEIGHT_NAMES)
