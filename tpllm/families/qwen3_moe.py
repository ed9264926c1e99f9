"""Qwen3 with experts: Qwen3's attention; some layers may have a plain MLP."""
from tpllm.families import llama, qwen2
from tpllm.families.family import Family
from tpllm.families.fields import flag
from tpllm.families.hf_config import attention_biases, decoder_config, expert_features, sparse_layers, window_everywhere

DEFAULTS = {
    **qwen2.DEFAULTS, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_key_value_heads": 4, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": None,
}
WEIGHT_NAMES = {
    **llama.WEIGHT_NAMES,
    "layers.{i}.mlp.router": "model.layers.{i}.mlp.gate.weight",
    **{f"layers.{{i}}.mlp.experts.{name}": f"model.layers.{{i}}.mlp.experts.{{e}}.{name}_proj.weight" for name in ("gate", "up", "down")},
}


def read_config(hf):
    return decoder_config(hf, has_qk_norm=True, **attention_biases(hf),
                          layer_windows=window_everywhere(hf) if flag(hf, "use_sliding_window") else (),
                          normalizes_expert_weights=flag(hf, "norm_topk_prob"), sparse_layers=sparse_layers(hf),
                          **expert_features(hf, num_experts="num_experts", expert_size="moe_intermediate_size"))


FAMILY = Family("Qwen3Moe", ("Qwen3MoeForCausalLM",), read_config, WEIGHT_NAMES, model_type="qwen3_moe", defaults=DEFAULTS,
                aliases={"num_local_experts": "num_experts"})
