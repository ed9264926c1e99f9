"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama's layout with fused projections, longrope, and a part of each head rotated."""
from tpllm.families.family import Family
from tpllm.families.hf_config import decoder_config, sliding_windows
from tpllm.families.llama import WEIGHT_NAMES as LLAMA_NAMES

WEIGHT_NAMES = {
    **LLAMA_NAMES,
    **{f"layers.{{i}}.attn.{name}": "model.layers.{i}.self_attn.qkv_proj.weight" for name in ("q", "k", "v")},
    **{f"layers.{{i}}.mlp.{name}": "model.layers.{i}.mlp.gate_up_proj.weight" for name in ("gate", "up")},
}
LONGROPE_NAMES = ("su", "yarn")  # in the first releases


def config_from_hf(hf):
    hf = {"original_max_position_embeddings": 4096, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, **hf}
    for field in ("rope_parameters", "rope_scaling"):
        rope = hf.get(field)
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in LONGROPE_NAMES:
            hf[field] = {**rope, "rope_type": "longrope"}
    return decoder_config(hf, layer_windows=sliding_windows(hf, is_used=True))


FAMILY = Family("Phi3", ("Phi3ForCausalLM",), config_from_hf, WEIGHT_NAMES)
