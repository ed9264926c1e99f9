"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama's layout with fused projections, longrope, and a part of each head rotated."""
from tpllm.families import llama
from tpllm.families.family import Family
from tpllm.families.hf_config import decoder_config, window_everywhere

DEFAULTS = {
    **llama.DEFAULTS, "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None,
}
WEIGHT_NAMES = {
    **llama.WEIGHT_NAMES,
    **{f"layers.{{i}}.attn.{name}": "model.layers.{i}.self_attn.qkv_proj.weight" for name in ("q", "k", "v")},
    **{f"layers.{{i}}.mlp.{name}": "model.layers.{i}.mlp.gate_up_proj.weight" for name in ("gate", "up")},
}
LONGROPE_NAMES = ("su", "yarn")  # in the first releases


def read_config(hf):
    for field in ("rope_parameters", "rope_scaling"):
        rope = hf[field]
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in LONGROPE_NAMES:
            hf = {**hf, field: {**rope, "rope_type": "longrope"}}
    return decoder_config(hf, layer_windows=window_everywhere(hf))


FAMILY = Family("Phi3", ("Phi3ForCausalLM",), read_config, WEIGHT_NAMES, model_type="phi3", defaults=DEFAULTS)
