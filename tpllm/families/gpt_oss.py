"""gpt-oss: experts with biases and a clamped gate in every layer, sinks in attention, and a window in every other layer."""
from pallas_kernels.gated_mlp import ClampedGlu
from tpllm.families import llama
from tpllm.families.family import Columns, Family
from tpllm.families.fields import positive_number
from tpllm.families.hf_config import attention_biases, decoder_config, expert_features, layer_types, sliding_windows

DEFAULTS = {
    **llama.DEFAULTS, "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "sliding_window": 128, "layer_types": None,
    "max_position_embeddings": 131072, "num_local_experts": 128, "num_experts_per_tok": 4, "attention_bias": True, "swiglu_limit": 7.0,
    "swiglu_alpha": 1.702,
}
ROPE = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
"""Where ``rope_parameters`` is missing or null."""
EXPERTS, TENSORS = "layers.{i}.mlp.experts", "model.layers.{i}.mlp.experts"
WEIGHT_NAMES = {
    **llama.WEIGHT_NAMES,
    "layers.{i}.attn.sinks": "model.layers.{i}.self_attn.sinks",
    "layers.{i}.mlp.router": "model.layers.{i}.mlp.router.weight", "layers.{i}.mlp.router_bias": "model.layers.{i}.mlp.router.bias",
    f"{EXPERTS}.gate": f"{TENSORS}.gate_up_proj", f"{EXPERTS}.gate_bias": f"{TENSORS}.gate_up_proj_bias",
    f"{EXPERTS}.up": f"{TENSORS}.gate_up_proj", f"{EXPERTS}.up_bias": f"{TENSORS}.gate_up_proj_bias",
    f"{EXPERTS}.down": f"{TENSORS}.down_proj", f"{EXPERTS}.down_bias": f"{TENSORS}.down_proj_bias",
}
COLUMNS = {f"{EXPERTS}.{part}{suffix}": columns for suffix in ("", "_bias")
           for part, columns in (("gate", Columns(0, 2)), ("up", Columns(1, 2)), ("down", Columns()))}


def read_config(hf):
    if hf["rope_parameters"] is None:
        hf = {**hf, "rope_parameters": ROPE}
    windows = sliding_windows(hf, layer_types(hf, slides=lambda layer: layer % 2 == 0))
    return decoder_config(
        hf, **attention_biases(hf), activation=ClampedGlu(positive_number(hf, "swiglu_limit"), positive_number(hf, "swiglu_alpha")),
        has_sinks=True, has_router_bias=True, has_expert_bias=True, layer_windows=windows,
        **expert_features(hf, num_experts="num_local_experts", expert_size="intermediate_size"))


FAMILY = Family("gpt-oss", ("GptOssForCausalLM",), read_config, WEIGHT_NAMES, model_type="gpt_oss", defaults=DEFAULTS,
                aliases={"num_experts": "num_local_experts"}, columns=COLUMNS)
