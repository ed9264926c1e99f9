"""SmolLM3: Llama with no rope in every fourth layer (NoPE: Kazemnejad et al. 2023, arXiv:2305.19466)."""
from tpllm.errors import ConfigError, short
from tpllm.families import llama
from tpllm.families.family import Family
from tpllm.families.fields import flag, positive
from tpllm.families.hf_config import attention_biases, decoder_config, num_hidden_layers, windows_if_used
from tpllm.families.rope import rope_from_hf

DEFAULTS = {
    **llama.DEFAULTS, "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
    "rope_theta": 2e6, "max_position_embeddings": 32768, "tie_word_embeddings": True, "no_rope_layers": None, "no_rope_layer_interval": 4,
    "use_sliding_window": False, "sliding_window": None, "layer_types": None,
}


def read_config(hf):
    num_layers, has_rope = num_hidden_layers(hf), hf["no_rope_layers"]  # in spite of its name: 1 for layers with rope
    if has_rope is None:
        interval = positive(hf, "no_rope_layer_interval")
        has_rope = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if not isinstance(has_rope, list) or len(has_rope) != num_layers or not all(type(item) in (int, bool) and item in (0, 1) for item in has_rope):
        raise ConfigError(f"config.json: no_rope_layers is {short(has_rope)}; it must have 0 or 1 for each of the {num_layers} layers")
    windows, rope = windows_if_used(hf, slides=lambda layer: not has_rope[layer]), rope_from_hf(hf)[0]
    return decoder_config(hf, layer_ropes=tuple(rope if rotates else None for rotates in has_rope), **attention_biases(hf),
                          has_mlp_bias=flag(hf, "mlp_bias"), layer_windows=windows)


FAMILY = Family("SmolLM3", ("SmolLM3ForCausalLM",), read_config, llama.WEIGHT_NAMES, model_type="smollm3", defaults=DEFAULTS)
