"""Qwen3 with experts: Qwen3's attention; some layers may have a plain MLP."""
from tpllm.families.family import Family
from tpllm.families.hf_config import decoder_config, expert_features, sliding_windows
from tpllm.families.llama import WEIGHT_NAMES as LLAMA_NAMES

DEFAULTS = {"num_local_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "max_position_embeddings": 32768}
WEIGHT_NAMES = {
    **LLAMA_NAMES,
    "layers.{i}.mlp.router": "model.layers.{i}.mlp.gate.weight",
    **{f"layers.{{i}}.mlp.experts.{name}": f"model.layers.{{i}}.mlp.experts.{{e}}.{name}_proj.weight" for name in ("gate", "up", "down")},
}


def config_from_hf(hf):
    hf = {**DEFAULTS, **hf, "max_window_layers": None}
    has_bias = hf.get("attention_bias", False)
    return decoder_config(hf, has_qk_norm=True, has_qkv_bias=has_bias, has_output_bias=has_bias,
                          normalizes_expert_weights=bool(hf.get("norm_topk_prob", False)),
                          layer_windows=sliding_windows(hf, is_used=hf.get("use_sliding_window", False)),
                          **expert_features(hf, expert_size="moe_intermediate_size"))


FAMILY = Family("Qwen3Moe", ("Qwen3MoeForCausalLM",), config_from_hf, WEIGHT_NAMES)
