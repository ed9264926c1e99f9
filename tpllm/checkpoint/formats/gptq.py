"""GPTQ checkpoints (Frantar et al. 2022, arXiv:2210.17323) as AutoGPTQ and GPTQModel write them.

``qweight`` int32 [K * bits / 32, N] has the codes along K, ``qzeros`` int32 [groups, N * bits / 32] the zeros along N, ``scales`` is
[groups, N], and ``g_idx`` int32 [K] has each input's group. ``w = scale * (code - zero)``; the older ``gptq`` format stores zeros minus one.
"""
import functools
import re
from collections.abc import Mapping

import numpy as np

from tpllm.checkpoint.formats.bits import unpack
from tpllm.checkpoint.formats.integers import IntegerScales, integer_scheme, middle
from tpllm.checkpoint.formats.matrix import FLOATS, Module, complete_groups, group_order, matrix_of, read_scales, read_transposed
from tpllm.checkpoint.formats.names import compile_pattern
from tpllm.checkpoint.formats.settings import Settings
from tpllm.checkpoint.read import TensorReader
from tpllm.checkpoint.safetensors import TensorEntry
from tpllm.checkpoint.stored import RowReader, StoredMatrix
from tpllm.errors import CheckpointError
from tpllm.weights.scheme import Scheme

BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"


class Gptq:
    """See :class:`~tpllm.checkpoint.stored.CheckpointFormat`."""

    name = "gptq"

    def __init__(self, settings: Settings, modules: Mapping[str, Module]):
        self._modules = modules
        self._is_v1 = _read_version(settings) == V1
        self._has_order = settings.flag("desc_act", default=False)
        self._layout = _read_layout(settings)
        self._overrides = _read_overrides(settings)

    def find(self, weight: str, shape: tuple[int, ...]) -> StoredMatrix | None:
        """See :meth:`tpllm.checkpoint.stored.CheckpointFormat.find`; it reads the zeros and the order of the inputs."""
        module = self._modules.get(weight.removesuffix(".weight"))
        if module is None or len(shape) != 2 or not module.has_any("qweight", "qzeros", "scales"):
            return None
        N, K = shape
        bits, group = self._layout_of(module, K)
        num_groups = complete_groups(module, K, group)
        if K * bits % 32:
            raise CheckpointError(f"module {module.name!r}: {K} inputs of {bits} bits do not fill 32-bit words; GPTQ has no layout for it")
        module.need("qweight", ("I32",), (K * bits // 32, N))
        module.need("qzeros", ("I32",), (num_groups, -(-N * bits // 32)))
        scales = module.need("scales", FLOATS, (num_groups, N))
        with TensorReader(1) as reader:
            has_zeros = bool((self._read_zeros(reader, module, bits, N) != middle(bits)).any())
            order = group_order(reader, self._group_index(module, K, group), group)
        scheme = integer_scheme(bits, group, scales.dtype, has_zeros=has_zeros)
        return matrix_of(module, (N, K), scheme, functools.partial(self._open, module, scheme, order=order), order=order)

    def _open(self, module: Module, scheme: Scheme, reader: TensorReader, *, order: np.ndarray | None) -> RowReader:
        """Read all of the matrix, which the file holds transposed."""
        words_NW = read_transposed(reader, module.parts["qweight"])
        N, K = words_NW.shape[0], words_NW.shape[1] * 32 // scheme.bits
        scales = IntegerScales.of(scheme, read_scales(reader, module.parts["scales"]).T, self._read_zeros(reader, module, scheme.bits, N))

        def rows(first: int, last: int):
            codes_NK = unpack(words_NW[first:last], scheme.bits, K)
            return scales.rows(codes_NK if order is None else codes_NK.take(order, axis=1), slice(first, last))
        return rows

    def _read_zeros(self, reader: TensorReader, module: Module, bits: int, num_outputs: int) -> np.ndarray:
        """uint8 [N, groups]."""
        zeros_GN = unpack(reader.read_raw(module.parts["qzeros"]), bits, num_outputs)
        if self._is_v1:
            # A stored zero of all ones was 0, as a zero is a code: in 32-bit words it would have borrowed from the next, so fields are added to.
            zeros_GN = (zeros_GN + np.uint8(1)) & np.uint8((1 << bits) - 1)
        return zeros_GN.T

    def _group_index(self, module: Module, num_inputs: int, group: int) -> TensorEntry | None:
        entry = module.parts.get("g_idx")
        if (entry is None or entry.shape == (0,)) and not (self._has_order and group):
            return None
        return module.need("g_idx", ("I32",), (num_inputs,))

    def _layout_of(self, module: Module, num_inputs: int) -> tuple[int, int]:
        """Of one module; see :func:`_read_layout`."""
        for pattern, is_quantized, settings in self._overrides:
            if pattern.match(module.name):
                if not is_quantized:
                    raise CheckpointError(f"{settings.where} says that module {module.name!r} is not quantized, but {module.name}.qweight is "
                                          "there; remove one of the two")
                bits, group = _read_layout(settings)
                break
        else:
            bits, group = self._layout
        return bits, 0 if group == num_inputs else group


def _read_version(settings: Settings) -> str:
    key = next((key for key in ("checkpoint_format", "format") if key in settings), "checkpoint_format")
    version = "marlin" if settings.flag("is_marlin_format", default=False) else settings.text(key, default=V1)
    if version not in (V1, V2):
        raise settings.error(key, f"of GPTQ's layouts {V1} and {V2} are read: take a checkpoint in one of them, or save it so with GPTQModel")
    if settings.text("pack_dtype", default="int32") != "int32":
        raise settings.error("pack_dtype", "codes are read from words of int32")
    return version


def _read_layout(settings: Settings) -> tuple[int, int]:
    """(bits of a code, inputs of a group, 0 for all)."""
    bits, group = settings.integer("bits"), settings.integer("group_size", default=-1)
    settings.one_of("bits", bits, BITS)
    if group != -1 and group <= 0:
        raise settings.error("group_size", "it must be positive, or -1 for one group")
    return bits, max(group, 0)


def _read_overrides(settings: Settings) -> list[tuple[re.Pattern, bool, Settings]]:
    """(expression, whether such modules are quantized, their settings) for each entry of ``dynamic``; the first that matches counts."""
    overrides = []
    table = settings.table("dynamic")
    for key in table.values:
        expression = key.removeprefix("+:").removeprefix("-:")
        override = table.table(key)
        merged = Settings({**settings.values, **override.values}, override.where)
        overrides.append((compile_pattern(expression, table.where), not key.startswith("-:"), merged))
    return overrides
