"""Which quantized format a checkpoint is in."""
from collections.abc import Callable, Mapping
from typing import Any

from tpllm.checkpoint.formats.auto_round import AUTO_ROUND, auto_round
from tpllm.checkpoint.formats.awq import Awq
from tpllm.checkpoint.formats.bitsandbytes import BitsAndBytes
from tpllm.checkpoint.formats.compressed import CompressedTensors
from tpllm.checkpoint.formats.float4 import MXFP4_MARKS, Mxfp4
from tpllm.checkpoint.formats.fp8 import Fp8
from tpllm.checkpoint.formats.gptq import Gptq
from tpllm.checkpoint.formats.matrix import Module, group_by_module
from tpllm.checkpoint.formats.settings import Settings
from tpllm.checkpoint.safetensors import TensorEntry
from tpllm.checkpoint.stored import CheckpointFormat
from tpllm.errors import CheckpointError

KEYS = ("quantization_config", "compression_config")
FORMATS: Mapping[str, Callable[[Settings, Mapping[str, Module]], CheckpointFormat]] = {
    "gptq": Gptq, "awq": Awq, "fp8": Fp8, "fbgemm_fp8": Fp8, "compressed-tensors": CompressedTensors, "bitsandbytes": BitsAndBytes,
    "mxfp4": Mxfp4, AUTO_ROUND: auto_round}
OTHER_NAMES = {"auto_round": AUTO_ROUND, "intel/auto-round": AUTO_ROUND}
"""That older writers gave."""
MARKS = {"gptq": ("qweight",), "awq": ("qweight",), "fp8": ("weight_scale_inv", "weight_scale"), "fbgemm_fp8": ("weight_scale",),
         "compressed-tensors": ("weight_packed", "weight_scale"), "bitsandbytes": ("SCB", "absmax"), "mxfp4": MXFP4_MARKS,
         AUTO_ROUND: ("qweight", "weight_packed", "weight_scale", "weight_scale_inv")}
"""The last part of names that tensors of a format have, and plain ones have not."""
_ALL_MARKS = frozenset(part for parts in MARKS.values() for part in parts)


def find_format(hf_config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> CheckpointFormat | None:
    """The format that a checkpoint's weights are in.

    Args:
        hf_config: config.json.
        tensors: every tensor of the checkpoint.

    Returns:
        None for plain weights.

    Raises:
        CheckpointError: a format that is not known, a quantization_config that does not fit the tensors or has a field that cannot be, or
            tensors that look quantized and nothing that says how.
    """
    folder = next(iter(tensors.values())).path.parent if tensors else "the checkpoint"
    modules = group_by_module(tensors)
    key = next((key for key in KEYS if hf_config.get(key)), None)
    marked = {part: f"{name}.{part}" for name, module in reversed(modules.items()) for part in module.parts if part in _ALL_MARKS}
    if key is None:
        if marked:
            raise CheckpointError(f"{folder}: tensor {min(marked.values())!r} is of quantized weights, but config.json has no quantization_config "
                                  "that says how; take the config.json that was published with them (older ones keep it in quantize_config.json: "
                                  "copy its fields there, with their quant_method)")
        return None
    settings = Settings(hf_config[key], f"{folder}/config.json: {key}")
    method = _method(settings)
    if method not in FORMATS:
        raise settings.error("quant_method", f"{method!r} is not read; known are {', '.join(FORMATS)}: take the model in one of them, or unquantized")
    own = MARKS[method]
    foreign = min((name for part, name in marked.items() if part not in own), default=None)
    if foreign is not None:
        methods = " or ".join(other for other, parts in MARKS.items() if foreign.rpartition(".")[2] in parts)
        raise settings.error("quant_method", f"but tensor {foreign!r} is what {methods} has; take the config.json that belongs to the weights")
    if not marked:
        raise settings.error("quant_method", f"but no tensor ends with .{' or .'.join(own)}: the weights are not quantized. Remove "
                             f"{key} from config.json, or take the quantized weights")
    return FORMATS[method](Settings({**settings.values, "quant_method": method}, settings.where), modules)


def _method(settings: Settings) -> str:
    """The quant_method; older writers of two formats left it out."""
    if "quant_method" not in settings:
        if "config_groups" in settings:
            return "compressed-tensors"
        if "load_in_4bit" in settings or "load_in_8bit" in settings:
            return "bitsandbytes"
        raise settings.error("quant_method", f"it must say one of {', '.join(FORMATS)}")
    method = settings.text("quant_method")
    return OTHER_NAMES.get(method, method)
