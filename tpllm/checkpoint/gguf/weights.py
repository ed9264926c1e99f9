"""The weights of a GGUF file as a checkpoint's: rows in the order and with the values that a Hugging Face checkpoint has.

Two things are undone that llama.cpp's converter (convert_hf_to_gguf.py) does: where its rope turns neighbouring dims (architecture ``llama``), it
lays the two halves of each query and key head alternately; and it adds 1 to Gemma's norms.
"""
import math
from collections.abc import Callable

import numpy as np

from tpllm.checkpoint.convert import STORED
from tpllm.checkpoint.gguf.blocks import DENSE, KEPT, OF_GGUF, has_gguf
from tpllm.checkpoint.gguf.header import GgufFile, GgufTensor
from tpllm.checkpoint.gguf.metadata import heads_of_layer
from tpllm.checkpoint.gguf.rope import read_factors
from tpllm.checkpoint.read import TensorReader
from tpllm.checkpoint.stored import RowReader, StoredMatrix
from tpllm.errors import CheckpointError, log
from tpllm.weights.scheme import E8M0_NAN, QuantizedRows, Scheme, dequantize

ALTERNATING = ("llama",)
"""Architectures whose query and key heads have dims i and i + H / 2 side by side."""
NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3")
HEAD_COUNTS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}


class GgufFormat:
    """See :class:`~tpllm.checkpoint.stored.CheckpointFormat`; weights are asked for by their names in the file (:mod:`.names`).

    Attributes:
        name: ``"gguf"``.
        tensors: every tensor.
    """

    name = "gguf"

    def __init__(self, gguf: GgufFile):
        self._gguf, self._arch, self.tensors = gguf, gguf.arch, gguf.tensors
        self._log_dequantized()

    def find(self, weight: str, shape: tuple[int, ...]) -> StoredMatrix | None:
        """See :meth:`tpllm.checkpoint.stored.CheckpointFormat.find`; ``None`` for tensors of plain floats whose values are as the model wants them.

        A stack of matrices [E, N, K] (experts) counts as one of [E * N, K] where a matrix is asked for. Vectors that are changed come with
        rows of shape [n].

        Raises:
            CheckpointError: a type that is not read, or heads that do not divide the rows.
        """
        tensor = self._gguf.tensors.get(weight)
        if tensor is None:
            return None
        head_dim, is_shifted = self._head_dim(tensor), self._arch in NORMS_PLUS_ONE and weight.endswith("norm.weight")
        scales, names = self._scales(tensor)
        if tensor.type.dtype in STORED and not head_dim and not is_shifted and scales is None:
            return None
        found = (tensor.num_rows, tensor.shape[-1]) if len(shape) == 2 and len(tensor.shape) == 3 else tensor.shape
        scheme = KEPT[tensor.type.name][0] if tensor.type.name in KEPT else None
        _check_type(tensor)

        def open_rows(reader: TensorReader) -> RowReader:
            rows = _vector_rows(reader, tensor) if len(tensor.shape) == 1 else _matrix_rows(reader, tensor)
            rows = rows if scales is None else _scaled(rows, scheme, scales, tensor.num_rows // len(scales))
            rows = _in_halves(rows, head_dim) if head_dim else rows
            return _without_one(rows) if is_shifted else rows
        kept = scheme if scales is None else None
        return StoredMatrix((weight, *names), found, kept, 8 * tensor.type.block_bytes / tensor.type.block, None, open_rows)

    def _scales(self, tensor: GgufTensor) -> tuple[np.ndarray | None, tuple[str, ...]]:
        """(float32 [1] or [experts] that multiply a matrix, None where there are none or they are 1; names of the tensors that go with it). NVFP4
        has them beside its blocks, and others for activations, which stay as they are."""
        module = tensor.name.removesuffix(".weight")
        names = tuple(name for name in (f"{module}.scale", f"{module}.input_scale") if name in self._gguf.tensors)
        if f"{module}.scale" not in names:
            return None, names
        found = read_factors(self._gguf, f"{module}.scale").astype(np.float32)
        if len(found) not in {1, tensor.shape[0] if len(tensor.shape) == 3 else 1}:
            raise CheckpointError(f"{tensor.path}: tensor {module + '.scale'!r} has {len(found)} values for {tensor.name!r} of shape {tensor.shape}; "
                                  "it must have one, or one for each expert. Convert the model again")
        return None if (found == 1).all() else found, names

    def _head_dim(self, tensor: GgufTensor) -> int:
        """The size of the heads whose halves alternate in the rows of a tensor; 0 where none do."""
        parts = tensor.name.split(".")
        if self._arch not in ALTERNATING or len(parts) != 4 or parts[0] != "blk" or parts[2] not in HEAD_COUNTS or not parts[1].isdecimal():
            return 0
        num_rows = tensor.shape[0] if parts[3] == "bias" else tensor.num_rows
        num_heads = heads_of_layer(self._gguf, HEAD_COUNTS[parts[2]], int(parts[1]))
        if num_rows % (2 * num_heads):
            raise CheckpointError(f"{tensor.path}: tensor {tensor.name!r} has {num_rows} rows, which {num_heads} heads "
                                  f"({self._arch}.{HEAD_COUNTS[parts[2]]}) of an even size do not divide. Convert the model again")
        return num_rows // num_heads

    def _log_dequantized(self) -> None:
        """One line on what it costs that some types are kept as plain arrays."""
        tensors = [tensor for tensor in self._gguf.tensors.values() if tensor.type.name in DENSE]
        if not tensors:
            return
        in_file, in_bfloat16 = sum(tensor.num_bytes for tensor in tensors) / 2**20, sum(math.prod(tensor.shape) for tensor in tensors) * 2 / 2**20
        log.warning("%s: %d tensors of %s are dequantized while they are read: %.1f MiB in the file take %.1f MiB in bfloat16 and %.1f MiB in "
                    "float32 (quantization=... makes them small again)", self._gguf.path, len(tensors),
                    ", ".join(sorted({tensor.type.name for tensor in tensors})), in_file, in_bfloat16, 2 * in_bfloat16)


def _check_type(tensor: GgufTensor) -> None:
    name = tensor.type.name
    if name not in KEPT and name not in DENSE and tensor.type.dtype not in STORED:
        raise CheckpointError(f"{tensor.path}: tensor {tensor.name!r} is {name}, which is not read; read are {', '.join([*KEPT, *DENSE])} and plain "
                              "floats. Quantize the model to one of these with llama-quantize")
    if name in OF_GGUF and not has_gguf():
        raise CheckpointError(f"{tensor.path}: tensor {tensor.name!r} is {name}, which the gguf package reads; it is not installed, or too old: "
                              "pip install 'gguf>=0.19'")


def _scaled(read: RowReader, scheme: Scheme | None, scales: np.ndarray, rows_each: int) -> RowReader:
    def rows(first: int, last: int) -> np.ndarray:
        part = read(first, last)
        floats = part if isinstance(part, np.ndarray) else dequantize(part, scheme)
        return floats * scales[np.arange(first, last) // rows_each][:, None]
    return rows


def _vector_rows(reader: TensorReader, tensor: GgufTensor) -> RowReader:
    if tensor.type.dtype not in STORED:
        raise CheckpointError(f"{tensor.path}: tensor {tensor.name!r} is a vector of {tensor.type.name}; vectors must be plain floats. "
                              "Convert the model again")
    return lambda first, last: _as_float32(reader.read_raw(tensor, first, last))


def _as_float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):  # NaN is as welcome as in any plain checkpoint, whose reader says nothing either
        return values.astype(np.float32)


def _without_one(read: RowReader) -> RowReader:
    def rows(first: int, last: int) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return read(first, last) - np.float32(1)
    return rows


def _matrix_rows(reader: TensorReader, tensor: GgufTensor) -> RowReader:
    """Rows in the order of the file."""
    entry, kind = tensor.blocks(), tensor.type

    def read(first: int, last: int) -> np.ndarray:
        return reader.read_raw(entry, first, last)

    def plain(first: int, last: int) -> np.ndarray:
        return _as_float32(read(first, last).view(STORED[kind.dtype]))

    def kept(first: int, last: int) -> QuantizedRows:
        rows = KEPT[kind.name][1](read(first, last).reshape(last - first, -1, kind.block_bytes))
        _check_finite(tensor, all(array is None or array.dtype != np.float16 or _is_finite(array) for array in rows.arrays().values()))
        _check_finite(tensor, not KEPT[kind.name][0].has_power_scales or not (rows.scales == E8M0_NAN).any())
        return rows

    def dense(first: int, last: int) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            rows = DENSE[kind.name](read(first, last).reshape(last - first, -1, kind.block_bytes)).reshape(last - first, -1)
        _check_finite(tensor, np.isfinite(rows).all())
        return rows
    return plain if kind.dtype else kept if kind.name in KEPT else dense


def _is_finite(values: np.ndarray) -> bool:
    """Whether float16 values are finite; numpy's own test makes each a float32 first."""
    return bool(((values.view(np.uint16) & 0x7C00) != 0x7C00).all())


def _check_finite(tensor: GgufTensor, is_finite: bool) -> None:
    if not is_finite:
        raise CheckpointError(f"{tensor.path}: tensor {tensor.name!r} holds scales that are not finite; download or convert the model again")


def _in_halves(read: Callable[[int, int], QuantizedRows | np.ndarray], head_dim: int) -> RowReader:
    """Rows with the two halves of a head one after the other, of rows that have them alternately."""
    half = head_dim // 2

    def rows(first: int, last: int) -> QuantizedRows | np.ndarray:
        heads, within = np.divmod(np.arange(first, last), head_dim)
        source = heads * head_dim + within % half * 2 + within // half
        begin, end = (int(source.min()), int(source.max()) + 1) if last > first else (first, first)
        part = read(begin, end)
        return part.take(source - begin) if isinstance(part, QuantizedRows) else part[source - begin]
    return rows
