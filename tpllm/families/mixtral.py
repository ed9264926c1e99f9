"""Mixtral: Mistral's attention, and experts in every layer."""
from tpllm.families import llama, mistral
from tpllm.families.family import Family
from tpllm.families.hf_config import decoder_config, expert_features, window_everywhere

DEFAULTS = {**mistral.DEFAULTS, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2}
WEIGHT_NAMES = {
    **llama.WEIGHT_NAMES,
    "layers.{i}.mlp.router": "model.layers.{i}.block_sparse_moe.gate.weight",
    "layers.{i}.mlp.experts.gate": "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight",
    "layers.{i}.mlp.experts.up": "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight",
    "layers.{i}.mlp.experts.down": "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight",
}


def read_config(hf):
    return decoder_config(hf, layer_windows=window_everywhere(hf),
                          **expert_features(hf, num_experts="num_local_experts", expert_size="intermediate_size"))


FAMILY = Family("Mixtral", ("MixtralForCausalLM",), read_config, WEIGHT_NAMES, model_type="mixtral", defaults=DEFAULTS,
                aliases={"num_experts": "num_local_experts"})
