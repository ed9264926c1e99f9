"""SmolLM3: Llama with no rope in every fourth layer (NoPE: Kazemnejad et al. 2023, arXiv:2305.19466)."""
from tpllm.errors import ConfigError
from tpllm.families.family import Family
from tpllm.families.hf_config import decoder_config, num_hidden_layers, positive, rope_from_hf, sliding_windows
from tpllm.families.llama import WEIGHT_NAMES

DEFAULTS = {"num_key_value_heads": 4, "rope_theta": 2e6, "max_position_embeddings": 32768, "tie_word_embeddings": True, "no_rope_layer_interval": 4}


def config_from_hf(hf):
    hf = {**DEFAULTS, **hf}
    num_layers, interval = num_hidden_layers(hf), positive(hf, "no_rope_layer_interval")
    has_rope = hf.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(num_layers)]  # in spite of its name: 1 for layers with rope
    if not isinstance(has_rope, list) or len(has_rope) != num_layers:
        raise ConfigError(f"config.json: no_rope_layers is {has_rope!r}; it must have 0 or 1 for each of the {num_layers} layers")
    hf["layer_types"] = hf.get("layer_types") or ["full_attention" if rotates else "sliding_attention" for rotates in has_rope]
    rope, has_bias = rope_from_hf(hf)[0], hf.get("attention_bias", False)
    return decoder_config(hf, layer_ropes=tuple(rope if rotates else None for rotates in has_rope), has_qkv_bias=has_bias, has_output_bias=has_bias,
                          has_mlp_bias=hf.get("mlp_bias", False), layer_windows=sliding_windows(hf, is_used=hf.get("use_sliding_window", False)))


FAMILY = Family("SmolLM3", ("SmolLM3ForCausalLM",), config_from_hf, WEIGHT_NAMES)
