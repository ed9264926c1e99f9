"""Which family opens which checkpoint."""
from collections.abc import Mapping
from typing import Any

from tpllm.errors import ConfigError, log, short
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

HEADLESS = "Model"
"""How the names of architectures without a head end, such as ``LlamaModel``: their weights are a decoder's."""


def find_family(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json: by ``architectures``, and by ``model_type`` where that is missing or names only a model without a head.

    Raises:
        ConfigError: an architecture no family covers; it lists those known.
    """
    names, model_type = _architectures(hf), hf.get("model_type")
    by_name = next((family for family in FAMILIES if set(family.architectures) & set(names)), None)
    by_type = next((family for family in FAMILIES if family.model_type == model_type), None)
    found = by_type if by_name is None and all(name.endswith(HEADLESS) for name in names) else by_name
    if found is None:
        given = short(", ".join(names)).strip("'\"") or "(none given)" + (f" of model_type {short(model_type)}" if model_type is not None else "")
        known = ", ".join(name for family in FAMILIES for name in family.architectures)
        raise ConfigError(f"config.json: unknown architecture {given}; known: {known}")
    if by_type is not None and by_type is not found:
        log.warning("config.json: architectures says %s and model_type %s; it is read as the latter, as transformers does", found.name, by_type.name)
        return by_type
    return found


def _architectures(hf: Mapping[str, Any]) -> list[str]:
    names = hf.get("architectures")
    names = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"config.json: architectures is {short(names)}; it must be a list of names, such as LlamaForCausalLM")
    return names
