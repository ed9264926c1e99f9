"""Qwen1.5-MoE and Qwen2 with experts: Qwen2's attention, and beside the routed experts one that every token goes through."""
from tpllm.families import qwen3_moe
from tpllm.families.family import Family
from tpllm.families.fields import count, flag, positive
from tpllm.families.hf_config import decoder_config, expert_features, sparse_layers, windows_if_used

DEFAULTS = {
    **qwen3_moe.DEFAULTS, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60,
    "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "qkv_bias": True,
}
WEIGHT_NAMES = {
    **qwen3_moe.WEIGHT_NAMES,
    **{f"layers.{{i}}.mlp.shared.{name}": f"model.layers.{{i}}.mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")},
    "layers.{i}.mlp.shared_gate": "model.layers.{i}.mlp.shared_expert_gate.weight",
}


def read_config(hf):
    windows = windows_if_used(hf, slides=lambda layer: layer % 2 == 0 and layer < count(hf, "max_window_layers"))
    return decoder_config(hf, has_qkv_bias=flag(hf, "qkv_bias"), normalizes_expert_weights=flag(hf, "norm_topk_prob"),
                          shared_expert_size=positive(hf, "shared_expert_intermediate_size"), sparse_layers=sparse_layers(hf), layer_windows=windows,
                          **expert_features(hf, num_experts="num_experts", expert_size="moe_intermediate_size"))


FAMILY = Family("Qwen2Moe", ("Qwen2MoeForCausalLM",), read_config, WEIGHT_NAMES, model_type="qwen2_moe", defaults=DEFAULTS)
