"""Experts in MXFP4 (OCP Microscaling Formats 1.0), as gpt-oss keeps them: one pair of tensors for all experts of a layer.

``NAME_blocks`` uint8 [E, N, K / 32, 16] has the codes of 32 inputs, the lower of a byte first, and ``NAME_scales`` uint8 [E, N, K / 32] their power
of two: where the plain checkpoint has ``NAME`` [E, K, N].
"""
import functools
from collections.abc import Mapping

from tpllm.checkpoint.formats.bits import nibbles
from tpllm.checkpoint.formats.matrix import read_exponents
from tpllm.checkpoint.formats.module import Module
from tpllm.checkpoint.formats.settings import Settings
from tpllm.checkpoint.read import TensorReader
from tpllm.checkpoint.safetensors import TensorEntry
from tpllm.checkpoint.stored import RowReader, StoredMatrix
from tpllm.errors import CheckpointError
from tpllm.weights.quantize import MXFP4
from tpllm.weights.scheme import QuantizedRows

BLOCKS, SCALES = "_blocks", "_scales"
EXPERTS = ("gate_up_proj", "down_proj")
MARKS = tuple(name + part for name in EXPERTS for part in (BLOCKS, SCALES))


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
        entries = _flat(blocks, (N, K // 2)), _flat(scales, (N, K // group))
        return StoredMatrix((blocks.name, scales.name), shape, MXFP4, bits, None, functools.partial(_open, *entries))


def _flat(entry: TensorEntry, shape: tuple[int, int]) -> TensorEntry:
    """The same bytes as a matrix of bytes."""
    return TensorEntry(entry.name, entry.path, "U8", shape, entry.start, entry.stop)


def _open(blocks: TensorEntry, scales: TensorEntry, reader: TensorReader) -> RowReader:
    def rows(first: int, last: int) -> QuantizedRows:
        return QuantizedRows(nibbles(reader.read_raw(blocks, first, last)), read_exponents(reader, scales, first, last))
    return rows
