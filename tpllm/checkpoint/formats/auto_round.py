"""AutoRound's folders (Cheng et al. 2023, arXiv:2309.05516; https://github.com/intel/auto-round): a config of their own around the tensors of others.

``packing_format`` says whose: ``auto_round:auto_gptq`` has GPTQ's, zeros minus one; ``auto_round`` and ``auto_round:gptqmodel`` those of its second
version, zeros as they are; ``auto_round:auto_awq`` AWQ's; ``auto_round:llm_compressor`` the 4- and 8-bit floats of compressed-tensors;
``auto_round:fp8_static``, or none with 8-bit floats, those of fp8. ``extra_config`` has what differs for a module, by its name or by an expression
that is found in the name.
"""
import re
from collections.abc import Mapping
from typing import Any

from tpllm.checkpoint.formats.awq import Awq
from tpllm.checkpoint.formats.compressed import CompressedTensors
from tpllm.checkpoint.formats.fp8 import Fp8
from tpllm.checkpoint.formats.gptq import V1, V2, Gptq
from tpllm.checkpoint.formats.matrix import Module
from tpllm.checkpoint.formats.settings import Settings
from tpllm.checkpoint.stored import CheckpointFormat

AUTO_ROUND = "auto-round"
GPTQ_VERSIONS = {"auto": V1, "auto_round:gptq": V1, "auto_round:auto_gptq": V1, "auto_round:auto_gptq:exllamav2": V1, "auto_round": V2,
                 "auto_round:gptqmodel": V2}
AWQ = ("auto_round:auto_awq", "auto_round:awq")
FLOAT8, FLOAT4 = "auto_round:fp8_static", "auto_round:llm_compressor"
INTEGERS, FLOATS, MICROSCALING, NVIDIA = "int", "fp", ("mx_fp", "mx_fp4", "mx_fp8", "mx_fp_rceil"), ("nv_fp", "nv_fp4", "nv_fp4_with_static_gs")
"""The values of ``data_type`` that are read."""
MODULE_KEYS = ("bits", "group_size", "data_type")


def auto_round(settings: Settings, modules: Mapping[str, Module]) -> CheckpointFormat:
    """The format behind an AutoRound config.

    Raises:
        CheckpointError: a packing or a data type that is not read.
    """
    found = _format_of(settings, modules)
    found.name = AUTO_ROUND
    return found


def _format_of(settings: Settings, modules: Mapping[str, Module]) -> Awq | CompressedTensors | Fp8 | Gptq:
    if settings.table("rotation_config").values or settings.values.get("rotation_configs"):
        raise settings.error("rotation_config", "models with rotations are not run: take one without")
    data_type = settings.text("data_type", default=INTEGERS)
    is_float8 = data_type.startswith(FLOATS)
    packing = settings.text("packing_format", default=FLOAT8 if is_float8 else "auto")
    if packing == FLOAT8 and is_float8:
        return _float8(settings, modules)
    if packing == FLOAT4 and data_type in (*MICROSCALING, *NVIDIA):
        return CompressedTensors(_compressed(settings, data_type), modules)
    if data_type not in (INTEGERS, "int_sym", "int_asym"):
        raise settings.error("data_type", f"with packing_format {packing!r} it is not read: read are {INTEGERS}, {FLOATS}, mx_fp and nv_fp")
    if "act_bits" in settings and settings.integer("act_bits") < 16:
        raise settings.error("act_bits", "integers whose activations are quantized, too, are not read in AutoRound's form")
    integers = {"bits": settings.integer("bits"), "group_size": settings.integer("group_size", default=128), "quant_method": AUTO_ROUND}
    if packing in AWQ:
        return Awq(Settings(integers | {"zero_point": True}, settings.where), modules)
    if packing not in GPTQ_VERSIONS:
        raise settings.error("packing_format", f"it is not read; known are {', '.join((*GPTQ_VERSIONS, *AWQ, FLOAT4, FLOAT8))}: export the model in "
                             "one of them")
    dynamic = {f"+:{pattern}": own for pattern, own in _own(settings)}
    return Gptq(Settings(integers | {"checkpoint_format": GPTQ_VERSIONS[packing], "dynamic": dynamic}, settings.where), modules)


def _own(settings: Settings) -> list[tuple[str, dict[str, Any]]]:
    """(an expression that a module's name begins with, what differs for it), names before expressions."""
    table = settings.table("extra_config")
    own = {key: {name: value for name, value in table.table(key).values.items() if name in MODULE_KEYS and value is not None} for key in table.values}
    is_name = re.compile(r"[\w.]+").fullmatch
    return [*((re.escape(key) + "$", values) for key, values in own.items() if is_name(key)),
            *((f".*(?:{key})", values) for key, values in own.items() if not is_name(key))]


def _float8(settings: Settings, modules: Mapping[str, Module]) -> Fp8:
    """``group_size`` is a pair where blocks share a scale."""
    block = {"weight_block_size": settings.values["group_size"]} if isinstance(settings.values.get("group_size"), list) else {}
    shifted = next((name for name, module in modules.items() if module.has_any("weight_zp")), None)
    if shifted is not None:
        raise settings.error("sym", f"8-bit floats with zeros ({shifted}.weight_zp) are not read: quantize with sym=True")
    activations = settings.text("activation_scheme", default="dynamic")
    return Fp8(Settings({"quant_method": AUTO_ROUND, "activation_scheme": activations, **block}, settings.where), modules)


def _compressed(settings: Settings, data_type: str) -> Settings:
    """The config that compressed-tensors has for such modules."""
    def group(targets: list[str], own: Mapping[str, Any]) -> dict[str, Any]:
        merged = Settings({**{key: settings.values.get(key) for key in MODULE_KEYS}, **own}, settings.where)
        bits, kind = merged.integer("bits"), merged.text("data_type", default=data_type)
        form = "nvfp4-pack-quantized" if kind in NVIDIA else "mxfp8-quantized" if bits == 8 else "mxfp4-pack-quantized"
        weights = {"num_bits": bits, "type": "float", "group_size": merged.integer("group_size"), "symmetric": True,
                   "strategy": "tensor_group" if kind in NVIDIA else "group"}
        return {"targets": targets, "format": form, "weights": weights}
    groups = {f"own_{index}": group([f"re:{pattern}"], own) for index, (pattern, own) in enumerate(_own(settings)) if own.get("bits", 4) in (4, 8)}
    return Settings({"format": "mixed-precision", "config_groups": {**groups, "all": group(["Linear"], {})}}, settings.where)
