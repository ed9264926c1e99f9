"""Reading Hugging Face's config.json, as transformers 4 (``rope_theta``, ``rope_scaling``) and 5 (``rope_parameters``) write it."""
import sys
from collections.abc import Mapping
from typing import Any

from tpllm.errors import ConfigError
from tpllm.model.config import ROPE_KINDS, ModelConfig, RopeConfig

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}

MOST_LAYERS, MOST_EXPERTS = 10_000, 4096


def decoder_config(hf: Mapping[str, Any], **features) -> ModelConfig:
    """The :class:`.ModelConfig` of a Llama-like config.json.

    Args:
        hf: config.json.
        **features: fields of :class:`.ModelConfig` that the family decides, these or others.

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
    rope, max_position = rope_from_hf(hf)
    _check_rotary_dims(rope, head_dim)
    fields = {
        "vocab_size": positive(hf, "vocab_size"), "hidden_size": hidden_size, "num_layers": num_hidden_layers(hf),
        "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "intermediate_size": positive(hf, "intermediate_size"),
        "max_position": max_position, "rope": rope, "norm_eps": positive_number(hf, "rms_norm_eps", 1e-6),
        "ties_embeddings": bool(hf.get("tie_word_embeddings", False))}
    return ModelConfig(**{"activation": activation(hf, "hidden_act"), **fields, **features})


def rope_from_hf(hf: Mapping[str, Any]) -> tuple[RopeConfig, int]:
    """(the rope rule, the longest context it serves) of a config.json of transformers 4 or 5."""
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"config.json: rope_parameters (or rope_scaling) is {scaling!r}; it must be an object with a rope_type")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ConfigError(f"config.json: unknown rope_type {kind!r}; known: {', '.join(ROPE_KINDS)}")
    common = {"theta": positive_number({**hf, **scaling}, "rope_theta", 10000.0),
              "partial_rotary_factor": positive_number({**hf, **scaling}, "partial_rotary_factor", 1.0)}
    positions = positive(hf, "max_position_embeddings", 2048)
    if kind == "default":
        return RopeConfig(**common), positions
    original = positions
    if kind != "dynamic":
        name = "original_max_position_embeddings"  # beside the rule it counts more than inside
        original = positive(scaling if hf.get(name) is None else hf, name, positions)
    factor = positive_number(scaling, "factor", positions / original)
    if factor < 1:
        raise ConfigError(f"config.json: rope factor {factor} of rope_type {kind!r} is below 1, the least")
    numbers = {name: positive_number(scaling, name) for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
                                                                 "attention_factor", "mscale", "mscale_all_dim") if scaling.get(name)}
    if kind == "longrope":
        numbers |= {ours: _factors(scaling, name) for ours, name in (("short_factors", "short_factor"), ("long_factors", "long_factor"))}
    rope = RopeConfig(kind=kind, factor=factor, original_max_position=original, truncate=bool(scaling.get("truncate", True)), **common, **numbers)
    return rope, max(positions, int(original * factor)) if kind in ("linear", "dynamic", "yarn") else positions


def _check_rotary_dims(rope: RopeConfig, head_dim: int) -> None:
    rotary_dim = rope.rotary_dim(head_dim)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ConfigError(f"config.json: partial_rotary_factor {rope.partial_rotary_factor} rotates {rotary_dim} of head_dim {head_dim}; it must be "
                          "an even number up to that")
    for name, factors in (("short_factor", rope.short_factors), ("long_factor", rope.long_factors)):
        if rope.kind == "longrope" and len(factors) != rotary_dim // 2:
            raise ConfigError(f"config.json: {name} has {len(factors)} numbers; it must have {rotary_dim // 2}, one for each pair of rotated dims")


def _factors(scaling: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = scaling.get(name)
    if not isinstance(values, list):
        raise ConfigError(f"config.json: {name} is {values!r}; longrope needs a list of numbers above 0")
    return tuple(positive_number({name: value}, name) for value in values)


def activation(hf: Mapping[str, Any], name: str) -> str:
    """:class:`.ModelConfig`'s name of an activation, silu by default."""
    value = hf.get(name, "silu")
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ConfigError(f"config.json: unknown {name} {value!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def layer_types(hf: Mapping[str, Any], *, full_every: int) -> list[str]:
    """``layer_types`` where given, else sliding attention in all layers but each ``full_every``-th."""
    num_layers, known = num_hidden_layers(hf), ("sliding_attention", "full_attention")
    kinds = hf.get("layer_types") or [known[(i + 1) % full_every == 0] for i in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in known for kind in kinds):
        raise ConfigError(f"config.json: layer_types is {kinds!r}; it must name sliding_attention or full_attention for each of the "
                          f"{num_layers} layers")
    return kinds


def sliding_windows(hf: Mapping[str, Any], *, is_used: bool) -> tuple[int | None, ...]:
    """The window of each layer: ``layer_types`` where given, else every layer (from ``max_window_layers`` on, where that is given)."""
    num_layers = num_hidden_layers(hf)
    if not is_used or hf.get("sliding_window") is None:
        return (None,) * num_layers
    window = positive(hf, "sliding_window")
    if hf.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types(hf, full_every=1))
    first = hf.get("max_window_layers") or 0
    if not isinstance(first, int):
        raise ConfigError(f"config.json: max_window_layers is {first!r}; it must be a whole number")
    return tuple(window if i >= first else None for i in range(num_layers))


def expert_features(hf: Mapping[str, Any], *, expert_size: str) -> dict[str, Any]:
    """The fields of :class:`.ModelConfig` that say which layers have experts, how many, and how large.

    Args:
        hf: config.json.
        expert_size: the field that holds an expert's inner size.
    """
    num_experts = positive(hf, "num_local_experts" if hf.get("num_experts") is None else "num_experts", largest=MOST_EXPERTS)
    step, dense = positive(hf, "decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise ConfigError(f"config.json: mlp_only_layers is {dense!r}; it must be a list of layers")
    sparse_layers = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_hidden_layers(hf)))
    return {"num_experts": num_experts, "num_experts_per_token": positive(hf, "num_experts_per_tok", largest=num_experts),
            "expert_size": positive(hf, expert_size), "sparse_layers": sparse_layers}


def num_hidden_layers(hf: Mapping[str, Any]) -> int:
    """How many layers config.json asks for."""
    return positive(hf, "num_hidden_layers", largest=MOST_LAYERS)


def positive(hf: Mapping[str, Any], name: str, default: int | None = None, *, largest: int = 2**31 - 1) -> int:
    """A whole number from 1 to ``largest`` from config.json."""
    value = hf.get(name)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"config.json: {name} is missing; the file does not describe a decoder")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json: {name} is {value!r}; it must be a whole number of at least 1")
    if value > largest:
        raise ConfigError(f"config.json: {name} is {value}; it may be {largest} at most")
    return value


def positive_number(fields: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A finite number above 0 from config.json or an object in it."""
    value = fields.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"config.json: {name} is {value!r}; it must be a number above 0")
    return float(value)


def optional_number(hf: Mapping[str, Any], name: str) -> float | None:
    """A finite number above 0, or None where the field is null or missing."""
    return None if hf.get(name) is None else positive_number(hf, name)
