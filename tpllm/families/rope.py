"""The rope rule of a config.json."""
from collections.abc import Mapping
from typing import Any

from tpllm.errors import ConfigError, short
from tpllm.families.fields import LARGEST, flag, positive, positive_number
from tpllm.model.config import ROPE_KINDS, RopeConfig

EXTENDS_BY_FACTOR = ("linear", "dynamic", "yarn")
FACTOR_OF_CONTEXTS = ("yarn", "longrope")
"""Kinds whose factor is how far the context was extended, where it is not given."""
BOUNDS = {"llama3": ("low_freq_factor", "high_freq_factor")}
ZERO_IS_NONE = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def rope_from_hf(hf: Mapping[str, Any]) -> tuple[RopeConfig, int]:
    """(the rope rule, the longest context it serves) of a config.json of transformers 4 or 5.

    ``rope_scaling`` goes before ``rope_parameters`` where both are there, as in transformers.
    """
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"config.json: rope_parameters (or rope_scaling) is {short(scaling)}; it must be an object with a rope_type")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise ConfigError(f"config.json: unknown rope_type {short(kind)}; known: {', '.join(ROPE_KINDS)}")
    given = {name: value for name, value in scaling.items() if value is not None}
    common = {"theta": positive_number({**hf, **given}, "rope_theta"),
              "partial_rotary_factor": positive_number({"partial_rotary_factor": 1.0, **hf, **given}, "partial_rotary_factor")}
    positions = positive(hf, "max_position_embeddings")
    if kind == "default":
        return RopeConfig(**common), positions
    original = _original_context(hf, given, kind, positions)
    factor = positive_number({"factor": positions / original if kind in FACTOR_OF_CONTEXTS else None, **given}, "factor")
    if factor < 1:
        raise ConfigError(f"config.json: rope factor {factor} of rope_type {kind!r} is below 1, the least")
    optional = [name for name in ZERO_IS_NONE if given.get(name)] + ["attention_factor"] * ("attention_factor" in given)
    numbers = {name: positive_number(given, name) for name in (*optional, *BOUNDS.get(kind, ()))}
    if kind == "longrope":
        numbers |= {ours: _factors(given, name) for ours, name in (("short_factors", "short_factor"), ("long_factors", "long_factor"))}
    rope = RopeConfig(kind=kind, factor=factor, original_max_position=original, truncate=flag({"truncate": True, **given}, "truncate"),
                      **common, **numbers)
    longest = max(positions, original * factor) if kind in EXTENDS_BY_FACTOR else positions
    if longest > LARGEST:
        raise ConfigError(f"config.json: rope factor {factor} makes a context of {original} tokens {longest:.3g} long; {LARGEST} is the most")
    return rope, int(longest)


def _original_context(hf: Mapping[str, Any], given: Mapping[str, Any], kind: str, positions: int) -> int:
    """The trained context: beside the rule it counts more than inside."""
    name = "original_max_position_embeddings"
    if kind == "dynamic":
        return positions
    return positive({name: positions, **given, **({name: hf[name]} if hf.get(name) is not None else {})}, name)


def check_rotary_dims(rope: RopeConfig, head_dim: int) -> None:
    """Refuse a rule that does not fit heads of this dim."""
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
        raise ConfigError(f"config.json: {name} is {short(values)}; longrope needs a list of numbers above 0")
    return tuple(positive_number({name: value}, name) for value in values)
