"""Gemma 3, text: Gemma 2 with query and key norms instead of the soft cap of scores (transformers reads attn_logit_softcapping and does not use it),
five sliding layers to a full one, and a rope rule for each kind of layer."""
from tpllm.errors import ConfigError
from tpllm.families.family import Family
from tpllm.families.gemma2 import WEIGHT_NAMES, features
from tpllm.families.hf_config import decoder_config, layer_types, positive, positive_number, rope_from_hf, sliding_windows

DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True, "max_position_embeddings": 131072, "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4}


def config_from_hf(hf):
    hf = {**DEFAULTS, **hf}
    if hf.get("use_bidirectional_attention"):
        raise ConfigError("config.json: use_bidirectional_attention is true; only causal attention is supported")
    hf["layer_types"] = layer_types(hf, full_every=positive(hf, "sliding_window_pattern"))
    by_type = hf.get("rope_parameters") or {"full_attention": hf.get("rope_scaling")}
    if not isinstance(by_type, dict) or not set(by_type) <= {"full_attention", "sliding_attention"}:
        raise ConfigError(f"config.json: rope_parameters is {by_type!r}; it must hold an object for full_attention and one for sliding_attention")
    hf |= {"rope_parameters": by_type.get("full_attention"), "rope_scaling": None}
    local = {**hf, "rope_theta": positive_number(hf, "rope_local_base_freq"), "rope_parameters": by_type.get("sliding_attention")}
    ropes = {"full_attention": rope_from_hf(hf)[0], "sliding_attention": rope_from_hf(local)[0]}
    windows = sliding_windows(hf, is_used=True)
    return decoder_config(hf, layer_windows=windows, layer_ropes=tuple(ropes[kind] for kind in hf["layer_types"]), has_qk_norm=True,
                          max_position=positive(hf, "max_position_embeddings"), **features(hf))


FAMILY = Family("Gemma3", ("Gemma3ForCausalLM",), config_from_hf, WEIGHT_NAMES)
