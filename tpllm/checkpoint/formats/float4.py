"""4-bit floats of two exponent bits and one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3).

``weight_packed`` uint8 [N, K / 2] has two codes a byte, the lower first. MXFP4 has a power of two for each 32 inputs, and is kept. NVFP4 has an E4M3
for each 16 and a float32 of the whole tensor that divides it (NVIDIA 2025, arXiv:2509.25149, section 2), and is dequantized while it is read.

gpt-oss keeps experts in MXFP4, in one pair of tensors for all of a layer: ``NAME_blocks`` uint8 [E, N, K / 32, 16] has the codes of 32 inputs, the
lower of a byte first, and ``NAME_scales`` uint8 [E, N, K / 32] their power of two: where the plain checkpoint has ``NAME`` [E, K, N].
"""
import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from tpllm.checkpoint.formats.bits import look_up_nibbles, nibbles
from tpllm.checkpoint.formats.matrix import E8M0, FLOATS, Module, complete_groups, matrix_of, read_exponents, read_scales
from tpllm.checkpoint.formats.settings import Settings
from tpllm.checkpoint.read import TensorReader
from tpllm.checkpoint.safetensors import TensorEntry
from tpllm.checkpoint.stored import RowReader, StoredMatrix
from tpllm.errors import CheckpointError
from tpllm.weights.quantize import MXFP4
from tpllm.weights.scheme import E2M1_VALUES, QuantizedRows

GLOBAL = "weight_global_scale"
BLOCKS, SCALES = "_blocks", "_scales"
MXFP4_MARKS = tuple(name + part for name in ("gate_up_proj", "down_proj") for part in (BLOCKS, SCALES))


def float4_matrix(module: Module, shape: tuple[int, int], *, group: int) -> StoredMatrix:
    """The matrix of a module with 4-bit floats; NVFP4 where it has a scale of the whole tensor.

    Args:
        module: its tensors.
        shape: (N, K).
        group: inputs that share a scale.
    """
    N, K = shape
    if not group or K % 2:
        raise CheckpointError(f"module {module.name!r}: 4-bit floats need a group_size and an even number of inputs; it has {group} and {K}")
    num_groups = complete_groups(module, K, group)
    module.need("weight_packed", ("U8",), (N, K // 2))
    scale = module.parts.get("weight_scale")
    if GLOBAL in module.parts or (scale is not None and scale.dtype == "F8_E4M3"):
        module.need(GLOBAL, ("F32",), (1,), ())
        module.need("weight_scale", ("F8_E4M3", *FLOATS), (N, num_groups))
    else:
        is_kept = module.need("weight_scale", (*E8M0, *FLOATS), (N, num_groups)).dtype in E8M0 and group == MXFP4.group
        if is_kept:
            return matrix_of(module, shape, MXFP4, functools.partial(_open_kept, module.parts["weight_packed"], scale))
    return matrix_of(module, shape, None, functools.partial(_open, module.parts, group))


def _open_kept(codes: TensorEntry, scales: TensorEntry, reader: TensorReader) -> RowReader:
    return lambda first, last: QuantizedRows(nibbles(reader.read_raw(codes, first, last)), read_exponents(reader, scales, first, last))


def _open(parts: Mapping[str, TensorEntry], group: int, reader: TensorReader) -> RowReader:
    scales = read_scales(reader, parts["weight_scale"]).astype(np.float32)
    if GLOBAL in parts:
        divisor = read_scales(reader, parts[GLOBAL]).reshape(())
        if divisor == 0:
            raise CheckpointError(f"{parts[GLOBAL].path}: tensor {parts[GLOBAL].name!r} is zero, and scales are divided by it")
        scales = scales / divisor

    def rows(first: int, last: int) -> np.ndarray:
        weights = look_up_nibbles(E2M1_VALUES, reader.read_raw(parts["weight_packed"], first, last))
        weights *= np.repeat(scales[first:last], group, axis=1)
        return weights
    return rows


class Mxfp4:
    """See :class:`~tpllm.checkpoint.stored.CheckpointFormat`. Modules that are listed as not converted are known by their tensors."""

    name = "mxfp4"

    def __init__(self, settings: Settings, modules: Mapping[str, Module]):
        self._modules = modules
        settings.names("modules_to_not_convert")

    def find(self, weight: str, shape: tuple[int, ...]) -> StoredMatrix | None:
        """See :meth:`tpllm.checkpoint.stored.CheckpointFormat.find`; rows are those of all experts one after the other."""
        name, _, part = weight.rpartition(".")
        module = self._modules.get(name)
        if module is None or len(shape) != 2 or not module.has_any(part + BLOCKS, part + SCALES):
            return None
        (N, K), group = shape, MXFP4.group
        if K % group:
            raise CheckpointError(f"{weight}: {K} inputs are no multiple of {group}, which share a scale in MXFP4; correct config.json's sizes")
        num_experts = next((entry.shape[0] for entry in module.parts.values() if len(entry.shape) > 2), 0) or 1
        rows = N // num_experts if N % num_experts == 0 else N
        blocks = module.need(part + BLOCKS, ("U8",), (num_experts, rows, K // group, group // 2))
        scales = module.need(part + SCALES, ("U8", "F8_E8M0"), (num_experts, rows, K // group))
        bits = 8 * (blocks.num_bytes + scales.num_bytes) / (N * K)
        entries = (dataclasses.replace(entry, dtype="U8", shape=(N, size)) for entry, size in ((blocks, K // 2), (scales, K // group)))
        return StoredMatrix((blocks.name, scales.name), shape, MXFP4, bits, None, functools.partial(_open_kept, *entries))
