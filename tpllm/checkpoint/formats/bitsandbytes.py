"""bitsandbytes checkpoints: LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) and 4-bit NF4 and FP4 (QLoRA, arXiv:2305.14314).

8 bits: ``weight`` int8 [N, K] times ``SCB`` [N] / 127. 4 bits: ``weight`` has two codes a byte, the upper first, of the flattened matrix; a
code is an index of ``quant_map`` [16], times ``absmax`` of its block, which may itself be such codes of 8 bits (nested quantization).
"""
import dataclasses
import functools
import json
from collections.abc import Mapping

import numpy as np

from tpllm.checkpoint.formats.bits import look_up_nibbles
from tpllm.checkpoint.formats.matrix import Module, log_dequantized, matrix_of, read_scales
from tpllm.checkpoint.formats.settings import Settings
from tpllm.checkpoint.read import TensorReader
from tpllm.checkpoint.safetensors import TensorEntry
from tpllm.checkpoint.stored import RowReader, StoredMatrix
from tpllm.errors import CheckpointError
from tpllm.weights.scheme import QuantizedRows, Scheme

INT8 = Scheme("int8", 8)
KINDS = ("nf4", "fp4")
MAX_STATE_BYTES = 10_000


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """What a 4-bit matrix says of itself.

    Attributes:
        size: weights that share an ``absmax``.
        nested_size: of those that share a ``nested_absmax``; 0 where ``absmax`` is float32 itself.
        nested_offset: added to every ``absmax`` that is nested.
    """

    size: int
    nested_size: int
    nested_offset: np.float32


class BitsAndBytes:
    """See :class:`~tpllm.checkpoint.stored.CheckpointFormat`. What llm_int8_skip_modules lists is known by its tensors."""

    name = "bitsandbytes"

    def __init__(self, settings: Settings, modules: Mapping[str, Module]):
        for key in ("load_in_4bit", "load_in_8bit"):
            settings.flag(key, default=False)
        settings.names("llm_int8_skip_modules")
        self._modules = modules
        log_dequantized("4-bit NF4 and FP4", sum(module.parts["weight"].num_bytes for name, module in modules.items()
                                                 if f"{name}.weight" in modules and "weight" in module.parts))

    def find(self, weight: str, shape: tuple[int, ...]) -> StoredMatrix | None:
        """See :meth:`tpllm.checkpoint.stored.CheckpointFormat.find`; it reads how a 4-bit matrix is quantized."""
        module, scales = self._modules.get(weight.removesuffix(".weight")), self._modules.get(weight)
        if len(shape) != 2 or (module is None and scales is None):
            return None
        if scales is not None:
            if module is None or "weight" not in module.parts:
                some = next(iter(scales.parts.values()))
                raise CheckpointError(f"{some.path.parent}: tensor {weight} is missing, while {some.name} is there; download it again")
            return self._find_4bit(module, weight, shape)
        stored = module.parts.get("weight")
        if "SCB" in module.parts or (stored is not None and stored.dtype in ("I8", "U8")):
            return _int8_matrix(module, shape)
        return None

    def _find_4bit(self, module: Module, weight: str, shape: tuple[int, int]) -> StoredMatrix:
        state = self._modules.get(f"{weight}.quant_state")
        kinds = [kind for kind in KINDS if state is not None and f"bitsandbytes__{kind}" in state.parts]
        parts = {"weight": module.need("weight", ("U8", "BF16", "F16", "F32"), *_packed_shapes(module, shape)), **self._modules[weight].parts}
        if len(kinds) != 1:
            raise CheckpointError(f"{parts['weight'].path}: {weight}.quant_state.bitsandbytes__nf4 or __fp4 is missing, or both are there: how "
                                  "the matrix was quantized is not known. Save the model again with transformers")
        with TensorReader(1) as reader:
            blocks = _read_state(reader, state.parts[f"bitsandbytes__{kinds[0]}"], shape)
        _check_blocks(self._modules[weight], blocks, shape)
        names = (*module.names(), *self._modules[weight].names(), *state.names())
        stored_bytes = sum(entry.num_bytes for entry in parts.values()) + sum(entry.num_bytes for entry in state.parts.values())
        return StoredMatrix(names, shape, None, 8 * stored_bytes / max(1, shape[0] * shape[1]), None,
                          functools.partial(_open_4bit, parts, blocks, shape))


def _int8_matrix(module: Module, shape: tuple[int, int]) -> StoredMatrix:
    weight = module.need("weight", ("I8",), shape)
    scales = module.need("SCB", ("F32",), (shape[0],))
    layout = module.parts.get("weight_format")
    with TensorReader(1) as reader:
        if layout is not None and reader.read_raw(module.need("weight_format", ("U8",), (), (1,))).any():
            raise CheckpointError(f"{layout.path}: tensor {layout.name!r}: codes in a layout of some GPU are not read; save the model again with "
                                  "bitsandbytes 0.45 or later")
    return matrix_of(module, shape, INT8, functools.partial(_open_int8, weight, scales))


def _open_int8(weight: TensorEntry, scales: TensorEntry, reader: TensorReader) -> RowReader:
    scales_N1 = (read_scales(reader, scales) / np.float32(127))[:, None]

    def rows(first: int, last: int) -> QuantizedRows:
        return QuantizedRows(reader.read_raw(weight, first, last), scales_N1[first:last])
    return rows


def _packed_shapes(module: Module, shape: tuple[int, int]) -> list[tuple[int, int]]:
    """What the codes may be stored as: bytes, or elements of the floats that stand for bytes (bnb_4bit_quant_storage)."""
    num_bytes, entry = -(-shape[0] * shape[1] // 2), module.parts.get("weight")
    itemsize = 1 if entry is None else {"BF16": 2, "F16": 2, "F32": 4}.get(entry.dtype, 1)
    return [(-(-num_bytes // itemsize), 1), (1, -(-num_bytes // itemsize))]


def _read_state(reader: TensorReader, entry: TensorEntry, shape: tuple[int, int]) -> _Blocks:
    """The JSON that is stored as a tensor of bytes."""
    where = f"{entry.path}: tensor {entry.name!r}"
    if entry.dtype != "U8" or entry.num_bytes > MAX_STATE_BYTES:
        raise CheckpointError(f"{where} is {entry.dtype} of {entry.num_bytes} bytes; it must be U8 of at most {MAX_STATE_BYTES}")
    try:
        state = Settings(json.loads(reader.read_raw(entry).tobytes().decode()), where)
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{where} is not JSON: {error}") from None
    if state.values.get("shape") != list(shape):
        raise state.error("shape", f"config.json makes it {list(shape)}")
    has_nested = "nested_blocksize" in state
    sizes = [state.integer("blocksize"), state.integer("nested_blocksize") if has_nested else 1]
    if min(sizes) <= 0:
        raise state.error("blocksize", "it and nested_blocksize must be positive")
    offset = state.values.get("nested_offset", 0.0)
    if has_nested and (not isinstance(offset, int | float) or not np.isfinite(np.float32(offset))):
        raise state.error("nested_offset", "it must be a number")
    return _Blocks(sizes[0], sizes[1] if has_nested else 0, np.float32(offset if has_nested else 0))


def _check_blocks(scales: Module, blocks: _Blocks, shape: tuple[int, int]) -> None:
    num_blocks = -(-shape[0] * shape[1] // blocks.size)
    scales.need("quant_map", ("F32",), (16,))
    if blocks.nested_size:
        scales.need("absmax", ("U8",), (num_blocks,))
        scales.need("nested_absmax", ("F32",), (-(-num_blocks // blocks.nested_size),))
        scales.need("nested_quant_map", ("F32",), (256,))
    else:
        scales.need("absmax", ("F32",), (num_blocks,))


def _open_4bit(parts: Mapping[str, TensorEntry], blocks: _Blocks, shape: tuple[int, int], reader: TensorReader) -> RowReader:
    K = shape[1]
    absmax, values = _read_absmax(reader, parts, blocks), read_scales(reader, parts["quant_map"])
    packed = dataclasses.replace(parts["weight"], dtype="U8", shape=(parts["weight"].num_bytes,))

    def rows(first: int, last: int) -> np.ndarray:
        start, stop = first * K, last * K
        octets = reader.read_raw(packed, start // 2, -(-stop // 2))
        weights = look_up_nibbles(values, octets, is_lower_first=False)[start % 2:][:stop - start]
        first_block, last_block = start // blocks.size, -(-stop // blocks.size)
        spread = np.repeat(absmax[first_block:last_block], blocks.size)[start - first_block * blocks.size:][:stop - start]
        weights *= spread
        return weights.reshape(last - first, K)
    return rows


def _read_absmax(reader: TensorReader, parts: Mapping[str, TensorEntry], blocks: _Blocks) -> np.ndarray:
    """float32, one a block."""
    if not blocks.nested_size:
        return read_scales(reader, parts["absmax"])
    codes = reader.read_raw(parts["absmax"])
    spread = np.repeat(read_scales(reader, parts["nested_absmax"]), blocks.nested_size)[:codes.size]
    return read_scales(reader, parts["nested_quant_map"])[codes] * spread + blocks.nested_offset
