"""Which family opens which checkpoint."""
from collections.abc import Mapping
from typing import Any

from tpllm.errors import ConfigError
from tpllm.families import (
    gemma,
    gemma2,
    gemma3,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
    starcoder2,
)
from tpllm.families.family import Family

FAMILIES: tuple[Family, ...] = tuple(module.FAMILY for module in (
    llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3, phi3, olmo2, granite, smollm3, starcoder2, mixtral, qwen2_moe, qwen3_moe,
    gpt_oss))


def find_family(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        ConfigError: an architecture no family covers; it lists those known.
    """
    architectures = hf.get("architectures") or []
    for family in FAMILIES:
        if set(family.architectures) & set(architectures):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise ConfigError(f"config.json: unknown architecture {', '.join(architectures) or '(none given)'}; known: {known}")
