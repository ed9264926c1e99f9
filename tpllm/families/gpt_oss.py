"""gpt-oss: experts with biases and a clamped gate in every layer, sinks in attention, and a window in every other layer."""
from pallas_kernels.gated_mlp import ClampedGlu
from tpllm.families.family import Columns, Family
from tpllm.families.hf_config import decoder_config, expert_features, layer_types, positive_number, sliding_windows
from tpllm.families.llama import WEIGHT_NAMES as LLAMA_NAMES

DEFAULTS = {"num_local_experts": 128, "num_experts_per_tok": 4, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "sliding_window": 128,
            "max_position_embeddings": 131072}
ROPE = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
EXPERTS, TENSORS = "layers.{i}.mlp.experts", "model.layers.{i}.mlp.experts"
WEIGHT_NAMES = {
    **LLAMA_NAMES,
    "layers.{i}.attn.sinks": "model.layers.{i}.self_attn.sinks",
    "layers.{i}.mlp.router": "model.layers.{i}.mlp.router.weight", "layers.{i}.mlp.router_bias": "model.layers.{i}.mlp.router.bias",
    f"{EXPERTS}.gate": f"{TENSORS}.gate_up_proj", f"{EXPERTS}.gate_bias": f"{TENSORS}.gate_up_proj_bias",
    f"{EXPERTS}.up": f"{TENSORS}.gate_up_proj", f"{EXPERTS}.up_bias": f"{TENSORS}.gate_up_proj_bias",
    f"{EXPERTS}.down": f"{TENSORS}.down_proj", f"{EXPERTS}.down_bias": f"{TENSORS}.down_proj_bias",
}
COLUMNS = {f"{EXPERTS}.{part}{suffix}": columns for suffix in ("", "_bias")
           for part, columns in (("gate", Columns(0, 2)), ("up", Columns(1, 2)), ("down", Columns()))}


def config_from_hf(hf):
    rope = {} if "rope_parameters" in hf or "rope_scaling" in hf else {"rope_scaling": ROPE}
    hf = {**DEFAULTS, **rope, **hf}
    hf["layer_types"], has_bias = layer_types(hf, full_every=2), hf.get("attention_bias", True)
    return decoder_config(
        hf, activation=ClampedGlu(positive_number(hf, "swiglu_limit", 7.0), positive_number(hf, "swiglu_alpha", 1.702)), has_qkv_bias=has_bias,
        has_output_bias=has_bias, has_sinks=True, has_router_bias=True, has_expert_bias=True, layer_windows=sliding_windows(hf, is_used=True),
        **expert_features(hf, expert_size="intermediate_size"))


FAMILY = Family("gpt-oss", ("GptOssForCausalLM",), config_from_hf, WEIGHT_NAMES, COLUMNS)
