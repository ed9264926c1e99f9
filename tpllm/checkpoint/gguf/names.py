"""What a tensor of a Hugging Face checkpoint is called in a GGUF file (gguf-py's tensor_mapping.py has all of them)."""
import re
from collections.abc import Mapping

WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up",
    "mlp.gate": "ffn_gate_inp", "mlp.router": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
SANDWICH = {"post_attention_layernorm": "post_attention_norm"}
"""Where a norm follows attention instead of going before the MLP."""
SANDWICH_ARCHS = ("gemma2", "gemma3", "gpt-oss")
"""gpt-oss has it before the MLP all the same."""
OF_PARAMETERS = {
    "layers.{i}.attn.sinks": "blk.{i}.attn_sinks.weight",
    **{f"layers.{{i}}.mlp.experts.{part}{suffix}": f"blk.{{i}}.ffn_{part}_exps.{kind}" for part in ("gate", "up", "down")
       for suffix, kind in (("", "weight"), ("_bias", "bias"))},
}
"""The parameters of ours whose tensor in the checkpoint has another form."""
EXPERT = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps", "w1": "ffn_gate_exps", "w3": "ffn_up_exps",
          "w2": "ffn_down_exps"}
"""One tensor [E, N, K] holds the experts of a layer."""
_LAYER_NAME = re.compile(r"model\.layers\.(\d+|\{i\})\.(.+)\.(weight|bias)")
_EXPERT_NAME = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(?:(?:\d+|\{\w+\})\.)?(\w+)")


def gguf_name(name: str, arch: str) -> str | None:
    """The GGUF name of a checkpoint's tensor, or of a pattern with ``{i}`` for the layer; None where GGUF has no such tensor.

    The name of an expert's matrix gives that of the stack of all experts.
    """
    stem, _, kind = name.rpartition(".")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{kind}"
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        return None
    layer, module, kind = match.groups()
    expert = _EXPERT_NAME.fullmatch(module)
    if expert is not None:
        found = EXPERT.get(expert[1])
    else:
        found = {**LAYER, **(SANDWICH if arch in SANDWICH_ARCHS else {})}.get(module)
    return found and f"blk.{layer}.{found}.{kind}"


def gguf_weight_names(weight_names: Mapping[str, str], arch: str) -> dict[str, str]:
    """A family's ``weight_names`` for a GGUF file: parameter name -> GGUF name, both with ``{i}`` for the layer; those without one keep theirs."""
    return {parameter: OF_PARAMETERS.get(parameter) or gguf_name(name, arch) or name for parameter, name in weight_names.items()}
