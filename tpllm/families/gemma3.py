"""Gemma 3, text: Gemma 2 with query and key norms instead of the soft cap of scores (transformers reads attn_logit_softcapping and does not use it),
five sliding layers to a full one, and a rope rule for each kind of layer."""
from tpllm.errors import ConfigError, short
from tpllm.families import gemma2
from tpllm.families.family import Family
from tpllm.families.fields import positive, positive_number
from tpllm.families.hf_config import FULL, SLIDING, decoder_config, layer_types, refuse_bidirectional, sliding_windows
from tpllm.families.rope import rope_from_hf

DEFAULTS = {
    **gemma2.DEFAULTS, "vocab_size": 262208, "max_position_embeddings": 131072, "final_logit_softcapping": None, "sliding_window_pattern": 6,
    "rope_theta": 1e6, "rope_local_base_freq": 1e4, "use_bidirectional_attention": False,
}


def read_config(hf):
    refuse_bidirectional(hf)
    kinds, rules = layer_types(hf, slides=lambda layer: (layer + 1) % positive(hf, "sliding_window_pattern") != 0), _rules(hf)
    ropes = {kind: rope_from_hf({**hf, "rope_scaling": None, "rope_parameters": rule})[0] for kind, rule in rules.items()}
    return decoder_config({**hf, "rope_scaling": None, "rope_parameters": rules[FULL]}, has_qk_norm=True,
                          layer_windows=sliding_windows(hf, kinds), layer_ropes=tuple(ropes[kind] for kind in kinds),
                          max_position=positive(hf, "max_position_embeddings"), **gemma2.features(hf))


def _rules(hf):
    """The rope rule of each kind of layer, with its theta; ``rope_scaling`` goes over that of full attention."""
    by_kind, scaling = hf["rope_parameters"] or {FULL: {"rope_type": "default"}}, hf["rope_scaling"] or {}
    if not isinstance(by_kind, dict) or not set(by_kind) <= {FULL, SLIDING}:
        raise ConfigError(f"config.json: rope_parameters is {short(by_kind)}; it must hold an object for {FULL} and one for {SLIDING}")
    full, sliding = by_kind.get(FULL) or {}, by_kind.get(SLIDING) or {}
    for rule in (full, sliding, scaling):
        if not isinstance(rule, dict):
            raise ConfigError(f"config.json: rope_parameters (or rope_scaling) has {short(rule)}; it must have an object with a rope_type")
    return {kind: {"rope_theta": positive_number({theta: rule.get("rope_theta", hf[theta])}, theta), **rule}
            for kind, theta, rule in ((FULL, "rope_theta", {**full, **scaling}), (SLIDING, "rope_local_base_freq", sliding))}


FAMILY = Family("Gemma3", ("Gemma3ForCausalLM",), read_config, gemma2.WEIGHT_NAMES, model_type="gemma3_text", defaults=DEFAULTS)
