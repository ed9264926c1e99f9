"""Qwen1.5-MoE and Qwen2 with experts: Qwen2's attention, and beside the routed experts one that every token goes through."""
from tpllm.errors import ConfigError
from tpllm.families.family import Family
from tpllm.families.hf_config import decoder_config, expert_features, positive, sliding_windows
from tpllm.families.qwen3_moe import WEIGHT_NAMES as EXPERT_NAMES

DEFAULTS = {"num_local_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "max_position_embeddings": 32768}
WEIGHT_NAMES = {
    **EXPERT_NAMES,
    **{f"layers.{{i}}.mlp.shared.{name}": f"model.layers.{{i}}.mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")},
    "layers.{i}.mlp.shared_gate": "model.layers.{i}.mlp.shared_expert_gate.weight",
}


def config_from_hf(hf):
    hf = {**DEFAULTS, **hf}
    has_windows = hf.get("use_sliding_window", False)
    if has_windows and not hf.get("layer_types"):
        raise ConfigError("config.json: use_sliding_window is true and layer_types is missing; it must say which layers have a window")
    return decoder_config(hf, has_qkv_bias=hf.get("qkv_bias", True), normalizes_expert_weights=bool(hf.get("norm_topk_prob", False)),
                          shared_expert_size=positive(hf, "shared_expert_intermediate_size", 5632),
                          layer_windows=sliding_windows(hf, is_used=has_windows), **expert_features(hf, expert_size="moe_intermediate_size"))


FAMILY = Family("Qwen2Moe", ("Qwen2MoeForCausalLM",), config_from_hf, WEIGHT_NAMES)
