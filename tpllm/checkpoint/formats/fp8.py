"""8-bit floats (Micikevicius et al. 2022, arXiv:2209.05433): ``weight`` [N, K] of E4M3 or E5M2, times a scale.

``weight_scale_inv`` has a scale for each block of outputs and inputs (DeepSeek-V3, arXiv:2412.19437, section 3.3; the name is historical, it
multiplies); ``weight_scale`` has one for the tensor, or one for each output (FBGEMM).
"""
import functools
from collections.abc import Mapping

import numpy as np

from tpllm.checkpoint.convert import STORED
from tpllm.checkpoint.formats.matrix import E8M0, FLOATS, Module, ScaleLines, Shape, matrix_of
from tpllm.checkpoint.formats.settings import Settings
from tpllm.checkpoint.read import TensorReader
from tpllm.checkpoint.stored import RowReader, StoredMatrix
from tpllm.errors import log
from tpllm.weights.scheme import QuantizedRows, Scheme

KINDS = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
SCALES = ("weight_scale_inv", "weight_scale")


class Fp8:
    """See :class:`~tpllm.checkpoint.stored.CheckpointFormat`. Modules that are listed as not converted are known by their tensors."""

    def __init__(self, settings: Settings, modules: Mapping[str, Module]):
        self.name = settings.text("quant_method")
        self._modules = modules
        self._block = settings.pair("weight_block_size") if "weight_block_size" in settings else None
        for key in ("modules_to_not_convert", "ignored_layers"):
            settings.names(key)
        log.info("%s: activations are not quantized (activation_scheme is %r)", self.name, settings.text("activation_scheme", default="dynamic"))

    def find(self, weight: str, shape: tuple[int, ...]) -> StoredMatrix | None:
        """See :meth:`tpllm.checkpoint.stored.CheckpointFormat.find`."""
        module = self._modules.get(weight.removesuffix(".weight"))
        if module is None or len(shape) != 2 or not is_float8(module):
            return None
        part = next((part for part in SCALES if part in module.parts), SCALES[self._block is None])
        return float8_matrix(module, shape, part=part, block=self._block if part == SCALES[0] else None)


def is_float8(module: Module) -> bool:
    """Whether a module's weight is of 8-bit floats, or has scales as if it were."""
    weight = module.parts.get("weight")
    return (weight is not None and weight.dtype.startswith("F8")) or module.has_any(*SCALES)


def float8_matrix(module: Module, shape: tuple[int, int], *, part: str, block: tuple[int, int] | None) -> StoredMatrix:
    """The matrix of a module with 8-bit floats.

    Args:
        module: its tensors.
        shape: (N, K).
        part: the scales' name.
        block: (outputs, inputs) that share a scale; (1, inputs) for groups, and None for one scale a tensor or an output.
    """
    N, K = shape
    weight = module.need("weight", tuple(KINDS), (N, K))
    dtypes = (*FLOATS, *E8M0) if block else FLOATS
    if block:
        num_groups = -(-K // block[1])
        lines = ScaleLines(module.need(part, dtypes, (-(-N // block[0]), num_groups)), num_groups, block[0])
    else:
        entry = module.need(part, dtypes, *output_shapes(N))
        lines = ScaleLines(entry, 1, N if entry.shape in TENSOR_SHAPES else 1)
    # Block scales are float32, as they are published: 0.25 bits of a weight, and no conversion in the product.
    scale_dtype = np.dtype(np.float32) if block else STORED[lines.entry.dtype]
    group = block[1] if block and block[1] < K else 0
    kind = KINDS[weight.dtype]
    scheme = Scheme(f"fp8-{kind}" + (f"-g{group}" if group else ""), 8, group, kind=kind, scale_dtype=scale_dtype)
    return matrix_of(module, (N, K), scheme, functools.partial(_open, module, scheme, lines))


TENSOR_SHAPES: tuple[Shape, ...] = ((), (1,), (1, 1))
"""The shapes that one scale for a whole tensor may have."""


def output_shapes(num_outputs: int) -> tuple[Shape, ...]:
    """The shapes that the scales may have: one for a tensor, or one for each output."""
    return (*TENSOR_SHAPES, (num_outputs, 1), (num_outputs,))


def _open(module: Module, scheme: Scheme, lines: ScaleLines, reader: TensorReader) -> RowReader:
    scales = lines.read(reader).astype(scheme.scale_dtype, copy=False)

    def rows(first: int, last: int) -> QuantizedRows:
        return QuantizedRows(reader.read_raw(module.parts["weight"], first, last), scales[lines.index(first, last)])
    return rows
