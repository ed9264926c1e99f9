"""Which family opens which checkpoint."""
from collections.abc import Mapping
from typing import Any

from tpllm.errors import ConfigError
from tpllm.families import llama, mistral, qwen2, qwen3
from tpllm.families.family import Family

FAMILIES: tuple[Family, ...] = (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY)


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
