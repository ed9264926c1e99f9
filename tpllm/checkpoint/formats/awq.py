"""AWQ checkpoints (Lin et al. 2023, arXiv:2306.00978) in AutoAWQ's ``gemm`` layout.

``qweight`` int32 [K, N / 8] and ``qzeros`` int32 [groups, N / 8] have 4-bit codes along N, of which the nibbles of a word, from the lowest,
are outputs 0 2 4 6 1 3 5 7; ``scales`` is [groups, N]. ``w = scale * (code - zero)``; without zeros a code of 8 is zero.
"""
import functools
from collections.abc import Mapping

import numpy as np

from tpllm.checkpoint.formats.integers import IntegerScales, integer_scheme, middle
from tpllm.checkpoint.formats.matrix import FLOATS, Module, complete_groups, matrix_of, read_scales, read_transposed
from tpllm.checkpoint.formats.settings import Settings
from tpllm.checkpoint.read import TensorReader
from tpllm.checkpoint.stored import RowReader, StoredMatrix
from tpllm.errors import CheckpointError
from tpllm.weights.scheme import Scheme

BITS, OUTPUTS_A_WORD = 4, 8
SHIFTS = np.uint32(BITS) * np.array([0, 4, 1, 5, 2, 6, 3, 7], np.uint32)
"""Where in a word the code of each of its eight outputs begins."""


class Awq:
    """See :class:`~tpllm.checkpoint.stored.CheckpointFormat`. What modules_to_not_convert lists is known by its tensors."""

    name = "awq"

    def __init__(self, settings: Settings, modules: Mapping[str, Module]):
        self._modules = modules
        settings.names("modules_to_not_convert")
        settings.one_of("bits" if "bits" in settings else "w_bit", settings.integer("bits", "w_bit", default=BITS), [BITS])
        group_key = "group_size" if "group_size" in settings else "q_group_size"
        self._group = settings.integer(group_key, default=128)
        if self._group != -1 and self._group <= 0:
            raise settings.error(group_key, "it must be positive, or -1 for one group")
        key = next((key for key in ("version", "checkpoint_format", "format") if key in settings), "version")
        if settings.text(key, default="gemm") != "gemm":
            raise settings.error(key, "of AWQ's layouts gemm is read: take a checkpoint in that, or save it so with AutoAWQ (version=\"GEMM\")")
        self._has_zeros = settings.flag("zero_point", default=True)

    def find(self, weight: str, shape: tuple[int, ...]) -> StoredMatrix | None:
        """See :meth:`tpllm.checkpoint.stored.CheckpointFormat.find`; it reads the zeros."""
        module = self._modules.get(weight.removesuffix(".weight"))
        if module is None or len(shape) != 2 or not module.has_any("qweight", "qzeros", "scales"):
            return None
        N, K = shape
        if N % OUTPUTS_A_WORD:
            raise CheckpointError(f"module {module.name!r}: {N} outputs do not fill words of {OUTPUTS_A_WORD} codes; AWQ has no layout for it")
        group = 0 if self._group in (-1, K) else self._group
        num_groups = complete_groups(module, K, group)
        module.need("qweight", ("I32",), (K, N // OUTPUTS_A_WORD))
        scales = module.need("scales", FLOATS, (num_groups, N))
        if self._has_zeros or "qzeros" in module.parts:
            module.need("qzeros", ("I32",), (num_groups, N // OUTPUTS_A_WORD))
        with TensorReader(1) as reader:
            zeros = _read_zeros(reader, module)
        scheme = integer_scheme(BITS, group, scales.dtype, has_zeros=zeros is not None and bool((zeros != middle(BITS)).any()))
        return matrix_of(module, (N, K), scheme, functools.partial(_open, module, scheme))


def _open(module: Module, scheme: Scheme, reader: TensorReader) -> RowReader:
    """Read all of the matrix, which the file holds transposed."""
    words_WK = read_transposed(reader, module.parts["qweight"])
    scales = IntegerScales.of(scheme, read_scales(reader, module.parts["scales"]).T, _read_zeros(reader, module))

    def rows(first: int, last: int):
        first_word = first // OUTPUTS_A_WORD
        codes_NK = _unpack(words_WK[first_word:-(-last // OUTPUTS_A_WORD)])
        return scales.rows(codes_NK[first - first_word * OUTPUTS_A_WORD:][:last - first], slice(first, last))
    return rows


def _read_zeros(reader: TensorReader, module: Module) -> np.ndarray | None:
    """uint8 [N, groups]; None where there are none."""
    entry = module.parts.get("qzeros")
    return None if entry is None else _unpack(read_transposed(reader, entry))


def _unpack(words_WK: np.ndarray) -> np.ndarray:
    """uint8 [8 W, K] of int32 [W, K]."""
    codes = (words_WK.view(np.uint32)[:, None] >> SHIFTS[:, None]) & np.uint32(15)
    return codes.astype(np.uint8).reshape(-1, words_WK.shape[1])
