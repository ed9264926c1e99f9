"""How compressed-tensors keeps what a scheme makes (https://github.com/vllm-project/compressed-tensors): tensors of a module, and the config."""
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tpllm.errors import ConfigError
from tpllm.weights.bits import pack_bits
from tpllm.weights.scheme import QuantizedRows, Scheme

PACKED, INTEGERS, FLOATS, MIXED = "pack-quantized", "int-quantized", "float-quantized", "mixed-precision"
WORD_BITS = 32


@dataclasses.dataclass(frozen=True)
class Planned:
    """One tensor to be written.

    Attributes:
        name, dtype, shape: of the tensor.
        rows_of: of a quantized module's, its rows of some quantized rows; None for the matrix's shape itself.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    rows_of: Callable[[QuantizedRows], np.ndarray] | None = None

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def format_of(scheme: Scheme) -> str:
    """The format that holds a scheme.

    Raises:
        ConfigError: none does.
    """
    if scheme.kind == "e4m3" and not scheme.group:
        return FLOATS
    if scheme.quantizes_input and not scheme.num_outliers:
        return INTEGERS
    if scheme.kind == "int" and not scheme.quantizes_input and scheme.mins == "none" and not scheme.super_group and scheme.bits in (4, 8):
        return PACKED
    raise ConfigError(f"scheme {scheme.name!r} cannot be written: compressed-tensors has no format for it; take int8, w8a8, fp8, int4, int4-g64 or "
                      "int4-g128")


def compress(scheme: Scheme, shape: tuple[int, int], name: str) -> list[Planned]:
    """The tensors of a module whose weight has this shape and this name.

    Raises:
        ConfigError: no format holds the scheme, or its groups do not divide the inputs.
    """
    kind, (N, K) = format_of(scheme), shape
    if scheme.group and K % scheme.group:
        raise ConfigError(f"{name} has {K} inputs, which groups of {scheme.group} do not divide; give it another scheme, or none, by a pattern")
    module = name.removesuffix(".weight")
    scales = Planned(f"{module}.weight_scale", scheme.scale_dtype, (N, scheme.num_groups(K)), lambda rows: rows.scales)
    if kind != PACKED:
        return [Planned(f"{module}.weight", scheme.code_dtype, shape, lambda rows: rows.codes), scales]
    words = -(-K * scheme.bits // WORD_BITS)
    return [Planned(f"{module}.weight_packed", np.dtype(np.int32), (N, words), lambda rows: _pack(rows.codes, scheme)), scales,
            Planned(f"{module}.weight_shape", np.dtype(np.int64), (2,))]


def _pack(codes_NK: np.ndarray, scheme: Scheme) -> np.ndarray:
    """int32 [N, words]: unsigned codes one after the other, the first in the lowest bits."""
    unsigned = (codes_NK.astype(np.int16) + (0 if scheme.zero else 2 ** (scheme.bits - 1))).astype(np.uint8)
    words = -(-codes_NK.shape[1] * scheme.bits // WORD_BITS)
    return np.ascontiguousarray(pack_bits(unsigned, scheme.bits)[:, :words * WORD_BITS // 8]).view(np.int32)


def describe_groups(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """The quantization_config of modules with these schemes; those with None and the head are ignored."""
    by_scheme: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        if scheme is not None:
            by_scheme.setdefault(scheme, []).append(module)
    formats = {format_of(scheme) for scheme in by_scheme}
    has_one = len(by_scheme) == 1
    groups = {f"group_{index}": {"targets": ["Linear"] if has_one else modules, "format": format_of(scheme), **_arguments(scheme)}
              for index, (scheme, modules) in enumerate(by_scheme.items())}
    return {"quant_method": "compressed-tensors", "quantization_status": "compressed", "format": formats.pop() if len(formats) == 1 else MIXED,
            "config_groups": groups, "ignore": ["lm_head", *(module for module, scheme in schemes.items() if scheme is None)],
            "kv_cache_scheme": None, "global_compression_ratio": None}


def _arguments(scheme: Scheme) -> dict[str, Any]:
    kind = {"num_bits": scheme.bits, "type": "int" if scheme.kind == "int" else "float", "symmetric": True}
    weights = {**kind, "strategy": "group" if scheme.group else "channel", "group_size": scheme.group or None, "dynamic": False, "actorder": None,
               "observer": "minmax"}
    inputs = {**kind, "strategy": "token", "group_size": None, "dynamic": True} if scheme.quantizes_input else None
    return {"weights": weights, "input_activations": inputs, "output_activations": None}
