"""Reading Hugging Face's config.json, as transformers 4 (``rope_theta``, ``rope_scaling``) and 5 (``rope_parameters``) write it."""
import math
from collections.abc import Mapping
from typing import Any

from tpllm.errors import ConfigError
from tpllm.model.config import ROPE_KINDS, ModelConfig, RopeConfig

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def decoder_config(hf: Mapping[str, Any], **features) -> ModelConfig:
    """The :class:`.ModelConfig` of a Llama-like config.json.

    Args:
        hf: config.json.
        **features: fields of :class:`.ModelConfig` that the family decides.

    Raises:
        ConfigError: a missing or impossible field, or an unknown activation or rope kind; it names the field.
    """
    num_heads = positive(hf, "num_attention_heads")
    num_kv_heads = positive(hf, "num_key_value_heads", num_heads)
    hidden_size = positive(hf, "hidden_size")
    if num_heads % num_kv_heads:
        raise ConfigError(f"config.json: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}")
    if hf.get("head_dim") is None and hidden_size % num_heads:
        raise ConfigError(f"config.json: hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}, and head_dim is not given")
    head_dim = positive(hf, "head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise ConfigError(f"config.json: head_dim {head_dim} is odd; rope needs an even one")
    activation = hf.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise ConfigError(f"config.json: unknown hidden_act {activation!r}; known: {', '.join(ACTIVATIONS)}")
    rope, max_position = rope_from_hf(hf)
    return ModelConfig(
        vocab_size=positive(hf, "vocab_size"), hidden_size=hidden_size, num_layers=positive(hf, "num_hidden_layers"), num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, intermediate_size=positive(hf, "intermediate_size"), max_position=max_position,
        activation=ACTIVATIONS[activation], norm_eps=positive_number(hf, "rms_norm_eps", 1e-6), rope=rope,
        ties_embeddings=bool(hf.get("tie_word_embeddings", False)), **features)


def rope_from_hf(hf: Mapping[str, Any]) -> tuple[RopeConfig, int]:
    """(the rope rule, the longest context it serves) of a config.json of transformers 4 or 5."""
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"config.json: rope_parameters (or rope_scaling) is {scaling!r}; it must be an object with a rope_type")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ConfigError(f"config.json: unknown rope_type {kind!r}; known: {', '.join(ROPE_KINDS)}")
    rotary_part = scaling.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    if rotary_part != 1.0:
        raise ConfigError(f"config.json: partial_rotary_factor {rotary_part} is not supported; only 1.0 is")
    theta = positive_number({**hf, **scaling}, "rope_theta", 10000.0)
    positions = positive(hf, "max_position_embeddings", 2048)
    if kind == "default":
        return RopeConfig(theta=theta), positions
    original = positions
    if kind != "dynamic":
        original = positive({**hf, **scaling}, "original_max_position_embeddings", positions)
    factor = positive_number(scaling, "factor", positions / original)
    if factor < 1:
        raise ConfigError(f"config.json: rope factor {factor} of rope_type {kind!r} is below 1, the least")
    numbers = {name: positive_number(scaling, name) for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
                                                                 "attention_factor", "mscale", "mscale_all_dim") if scaling.get(name)}
    rope = RopeConfig(kind=kind, theta=theta, factor=factor, original_max_position=original, truncate=bool(scaling.get("truncate", True)),
                      **numbers)
    return rope, max(positions, int(original * factor)) if kind in ("linear", "dynamic", "yarn") else positions


def sliding_windows(hf: Mapping[str, Any], *, is_used: bool) -> tuple[int | None, ...]:
    """The window of each layer: ``layer_types`` where given, else every layer (from ``max_window_layers`` on, where that is given)."""
    num_layers = positive(hf, "num_hidden_layers")
    if not is_used or hf.get("sliding_window") is None:
        return (None,) * num_layers
    window, layer_types = positive(hf, "sliding_window"), hf.get("layer_types")
    if layer_types:
        if len(layer_types) != num_layers or set(layer_types) - {"sliding_attention", "full_attention"}:
            raise ConfigError(f"config.json: layer_types is {layer_types!r}; it must name sliding_attention or full_attention for each of "
                              f"the {num_layers} layers")
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    first = hf.get("max_window_layers") or 0
    return tuple(window if i >= first else None for i in range(num_layers))


def positive(hf: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number of at least 1 from config.json."""
    value = hf.get(name)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"config.json: {name} is missing; the file does not describe a decoder")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json: {name} is {value!r}; it must be a whole number of at least 1")
    return value


def positive_number(fields: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A finite number above 0 from config.json or an object in it."""
    value = fields.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"config.json: {name} is {value!r}; it must be a number above 0")
    return float(value)
