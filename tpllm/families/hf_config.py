"""Reading Hugging Face's config.json, as transformers 4 (``rope_theta``, ``rope_scaling``) and 5 (``rope_parameters``) write it.

What is read has every key of the family's ``defaults``; a null is what the file says, and not the same as a key that is left out.
"""
from collections.abc import Callable, Mapping
from typing import Any

from tpllm.errors import ConfigError, log, short
from tpllm.families.fields import count, flag, optional_count, positive, positive_number
from tpllm.families.rope import check_rotary_dims, rope_from_hf
from tpllm.model.config import ModelConfig

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
SLIDING, FULL = "sliding_attention", "full_attention"
MOST_LAYERS, MOST_EXPERTS = 10_000, 4096


def decoder_config(hf: Mapping[str, Any], **features) -> ModelConfig:
    """The :class:`.ModelConfig` of a Llama-like config.json.

    Args:
        hf: config.json over the family's defaults.
        **features: fields of :class:`.ModelConfig` that the family decides, these or others.

    Raises:
        ConfigError: a missing or impossible field, or an unknown activation or rope kind; it names the field.
    """
    num_heads = positive(hf, "num_attention_heads")
    num_kv_heads = optional_count(hf, "num_key_value_heads") or num_heads
    hidden_size = positive(hf, "hidden_size")
    if num_heads % num_kv_heads:
        raise ConfigError(f"config.json: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}")
    head_dim = optional_count(hf, "head_dim")
    if head_dim is None and hidden_size % num_heads:
        raise ConfigError(f"config.json: hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}, and head_dim is not given")
    head_dim = head_dim or hidden_size // num_heads
    if head_dim % 2:
        raise ConfigError(f"config.json: head_dim {head_dim} is odd; rope needs an even one")
    rope, max_position = rope_from_hf(hf)
    check_rotary_dims(rope, head_dim)
    fields = {
        "vocab_size": positive(hf, "vocab_size"), "hidden_size": hidden_size, "num_layers": num_hidden_layers(hf),
        "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "intermediate_size": positive(hf, "intermediate_size"),
        "max_position": max_position, "rope": rope, "ties_embeddings": flag(hf, "tie_word_embeddings"), **features}
    for name, key, read in (("activation", "hidden_act", activation), ("norm_eps", "rms_norm_eps", positive_number)):
        if name not in features:  # a family that decides it does not read the field
            fields[name] = read(hf, key)
    return ModelConfig(**fields)


def activation(hf: Mapping[str, Any], name: str) -> str:
    """:class:`.ModelConfig`'s name of an activation."""
    value = hf[name]
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ConfigError(f"config.json: unknown {name} {short(value)}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def attention_biases(hf: Mapping[str, Any]) -> dict[str, bool]:
    """The fields of :class:`.ModelConfig` that say where attention adds biases, for models in which ``attention_bias`` says it of all projections."""
    return dict.fromkeys(("has_qkv_bias", "has_output_bias"), flag(hf, "attention_bias"))


def layer_types(hf: Mapping[str, Any], *, slides: Callable[[int], bool]) -> list[str]:
    """``layer_types`` where given, else sliding attention in the layers, counted from 0, that ``slides`` says."""
    num_layers, kinds = num_hidden_layers(hf), hf["layer_types"]
    if kinds is None:
        return [SLIDING if slides(layer) else FULL for layer in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(isinstance(kind, str) and kind in (SLIDING, FULL) for kind in kinds):
        raise ConfigError(f"config.json: layer_types is {short(kinds)}; it must name {SLIDING} or {FULL} for each of the {num_layers} layers")
    return kinds


def sliding_windows(hf: Mapping[str, Any], kinds: list[str]) -> tuple[int | None, ...]:
    """The window of each layer, by the kinds of ``layer_types``; none where ``sliding_window`` is null."""
    window = optional_count(hf, "sliding_window")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def windows_if_used(hf: Mapping[str, Any], *, slides: Callable[[int], bool]) -> tuple[int | None, ...]:
    """As :func:`sliding_windows` where ``use_sliding_window`` is true; else none, and the other fields are not read."""
    if not flag(hf, "use_sliding_window"):
        return (None,) * num_hidden_layers(hf)
    return sliding_windows(hf, layer_types(hf, slides=slides))


def window_everywhere(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    """One window in all layers, or none. Such models have no ``layer_types`` and ``max_window_layers``: what a file says there is checked and,
    as in transformers, not used."""
    everywhere = [SLIDING] * num_hidden_layers(hf)
    kinds = layer_types({"layer_types": None, **hf}, slides=lambda _: True)
    if hf.get("max_window_layers") is not None:
        count(hf, "max_window_layers")
    if kinds != everywhere and hf["sliding_window"] is not None:
        log.warning("config.json: a %s model has its sliding window in every layer; layer_types is not used", hf.get("model_type"))
    return sliding_windows(hf, everywhere)


def refuse_bidirectional(hf: Mapping[str, Any]) -> None:
    """Refuse a model whose attention is not causal."""
    if hf["use_bidirectional_attention"] is not None and flag(hf, "use_bidirectional_attention"):
        raise ConfigError("config.json: use_bidirectional_attention is true; only causal attention is supported")


def expert_features(hf: Mapping[str, Any], *, num_experts: str, expert_size: str) -> dict[str, Any]:
    """The fields of :class:`.ModelConfig` that say how many experts there are, and how large.

    Args:
        hf: config.json.
        num_experts, expert_size: the fields that hold them.
    """
    total = positive(hf, num_experts, largest=MOST_EXPERTS)
    used = positive(hf, "num_experts_per_tok", largest=total)
    return {"num_experts": total, "num_experts_per_token": used, "expert_size": positive(hf, expert_size)}


def sparse_layers(hf: Mapping[str, Any]) -> tuple[bool, ...]:
    """Which layers have experts: each ``decoder_sparse_step``-th but those of ``mlp_only_layers``."""
    step, dense = positive(hf, "decoder_sparse_step"), hf["mlp_only_layers"]
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ConfigError(f"config.json: mlp_only_layers is {short(dense)}; it must be a list of layers")
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_hidden_layers(hf)))


def num_hidden_layers(hf: Mapping[str, Any]) -> int:
    """How many layers config.json asks for."""
    return positive(hf, "num_hidden_layers", largest=MOST_LAYERS)
