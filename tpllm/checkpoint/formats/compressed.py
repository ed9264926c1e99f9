"""compressed-tensors checkpoints (https://github.com/vllm-project/compressed-tensors): integers packed or not, 8-bit and 4-bit floats.

Packed integers are stored unsigned, with half their range added, as zeros are: ``w = scale * (code - zero)`` needs no correction.
"""
import functools
from collections.abc import Mapping

import numpy as np

from tpllm.checkpoint.formats.bits import unpack, unpack_whole_words
from tpllm.checkpoint.formats.compressed_config import FP4, PACKED, PLAIN, Args, Groups
from tpllm.checkpoint.formats.float4 import float4_matrix
from tpllm.checkpoint.formats.fp8 import TENSOR_SHAPES, float8_matrix, output_shapes
from tpllm.checkpoint.formats.integers import IntegerScales, integer_scheme, middle
from tpllm.checkpoint.formats.matrix import E8M0, FLOATS, Module, ScaleLines, Shape, complete_groups, group_order, log_dequantized, matrix_of
from tpllm.checkpoint.formats.settings import Settings
from tpllm.checkpoint.read import TensorReader
from tpllm.checkpoint.safetensors import TensorEntry
from tpllm.checkpoint.stored import RowReader, StoredMatrix
from tpllm.errors import CheckpointError
from tpllm.weights.scheme import QuantizedRows, Scheme

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale")
"""Tensors that plain modules have not."""
SCALE, ZERO = "weight_scale", "weight_zero_point"


class CompressedTensors:
    """See :class:`~tpllm.checkpoint.stored.CheckpointFormat`. A module without quantized tensors is a plain one, whatever the groups say."""

    name = "compressed-tensors"

    def __init__(self, settings: Settings, modules: Mapping[str, Module]):
        self._modules, self._groups, self._where = modules, Groups(settings), settings.where
        self._status = settings.text("quantization_status", default="compressed")
        log_dequantized("4-bit float", sum(module.parts["weight_packed"].num_bytes for module in modules.values()
                                           if "weight_packed" in module.parts and module.parts["weight_packed"].dtype == "U8"
                                           and not (SCALE in module.parts and module.parts[SCALE].dtype in E8M0)))

    def find(self, weight: str, shape: tuple[int, ...]) -> StoredMatrix | None:
        """See :meth:`tpllm.checkpoint.stored.CheckpointFormat.find`."""
        module = self._modules.get(weight.removesuffix(".weight"))
        stored = module and _stored_part(module)
        if stored is None or len(shape) != 2:
            return None
        args = self._groups.find(module.name)
        if args is None:
            raise CheckpointError(f"{self._where}: module {module.name!r} has quantized tensors ({module.name}.{stored}), but it is "
                                  "ignored or in no config group; name it in the targets of the group that it was quantized with")
        layout = args.layout or _layout_of_tensors(module)
        self._refuse_uncompressed(module)
        if layout == PACKED and not args.is_float:
            return _packed_matrix(module, shape, args)
        if layout == FP4 and args.is_float and args.bits == 4:
            return float4_matrix(module, shape, group=args.block[1])
        if layout == PLAIN and args.is_float and args.bits == 8 and args.is_symmetric:
            return float8_matrix(module, shape, part=SCALE, block=args.block if all(args.block) else None)
        if layout == PLAIN and not args.is_float:
            return _plain_matrix(module, shape, args)
        kind = f"{'' if args.is_symmetric else 'asymmetric '}{'floats' if args.is_float else 'integers'} of {args.bits} bits"
        raise CheckpointError(f"{self._where}: module {module.name!r}: {kind} in a {layout} is not read; correct the format, num_bits or type of "
                              "its config group, or save the model in another format")


    def _refuse_uncompressed(self, module: Module) -> None:
        weight = module.parts.get("weight")
        if weight is not None and weight.dtype in FLOATS:
            raise CheckpointError(f"{weight.path}: tensor {weight.name!r} is {weight.dtype} beside scales: it was saved before it was compressed "
                                  f"(quantization_status is {self._status!r}); save the model with save_compressed=True")


def _stored_part(module: Module) -> str | None:
    """A tensor that shows that the module is quantized; None if it is not."""
    weight = module.parts.get("weight")
    is_small = weight is not None and (weight.dtype == "I8" or weight.dtype.startswith("F8"))
    return next((part for part in PARTS if part in module.parts), "weight" if is_small else None)


def _layout_of_tensors(module: Module) -> str:
    packed = module.parts.get("weight_packed")
    return PLAIN if packed is None else FP4 if packed.dtype == "U8" else PACKED


def _scale_lines(module: Module, shape: Shape, args: Args, *, part: str = SCALE, dtypes: tuple[str, ...] = FLOATS) -> ScaleLines:
    """Scales or unpacked zeros in the shape that the strategy has."""
    (N, K), (height, group) = shape, args.block
    if height > 1 and group:
        num_groups = -(-K // group)
        return ScaleLines(module.need(part, dtypes, (-(-N // height), num_groups)), num_groups, height)
    num_groups = complete_groups(module, K, group)
    shapes = ((N, num_groups),) if group else output_shapes(N) if height else TENSOR_SHAPES
    entry = module.need(part, dtypes, *shapes)
    return ScaleLines(entry, num_groups, N if not group and entry.shape in TENSOR_SHAPES else 1)


def _scheme(args: Args, stored: str, num_inputs: int) -> Scheme:
    group = args.block[1] if args.block[1] < num_inputs else 0
    return integer_scheme(args.bits, group, stored, has_zeros=not args.is_symmetric, quantizes_input=args.quantizes_input)


def _packed_matrix(module: Module, shape: Shape, args: Args) -> StoredMatrix:
    """Codes in 32-bit words along K; older files let none cross words."""
    N, K = shape
    lines = _scale_lines(module, shape, args)
    dense, whole = _num_words(K, args.bits)
    packed = module.need("weight_packed", ("I32",), *{(N, dense): None, (N, whole): None})
    if not args.is_symmetric:
        zeros = module.parts.get(ZERO)
        if zeros is not None and zeros.dtype == "I8":
            _scale_lines(module, shape, args, part=ZERO, dtypes=("I8",))
        else:
            module.need(ZERO, ("I32",), *{(words, lines.num_groups): None for words in _num_words(N, args.bits)})
    order_entry = module.need("weight_g_idx", ("I32",), (K,)) if args.has_order or "weight_g_idx" in module.parts else None
    with TensorReader(1) as reader:
        _check_shape(reader, module, shape)
        is_plain = order_entry is None or (reader.read_raw(order_entry) == -1).any()  # -1 is the library's sign that there is no order
        order = None if is_plain else group_order(reader, order_entry, args.block[1])
    scheme = _scheme(args, lines.entry.dtype, K)
    opener = functools.partial(_open_packed, module, shape, scheme=scheme, lines=lines, order=order, is_dense=packed.shape[1] == dense)
    return matrix_of(module, shape, scheme, opener, order=order)


def _num_words(count: int, bits: int) -> tuple[int, int]:
    """The number of words that so many codes take: if codes may cross words, and if they do not."""
    return -(-count * bits // 32), -(-count // (32 // bits))


def _check_shape(reader: TensorReader, module: Module, shape: Shape) -> None:
    entry = module.parts.get("weight_shape")
    if entry is not None:
        stored = reader.read_raw(module.need("weight_shape", ("I64", "I32"), (2,))).tolist()
        if tuple(stored) != shape:
            raise CheckpointError(f"{entry.path}: tensor {entry.name!r} says that the matrix is {tuple(stored)}; config.json makes it {shape}")


def _open_packed(module: Module, shape: Shape, reader: TensorReader, *, scheme: Scheme, lines: ScaleLines, order: np.ndarray | None,
                 is_dense: bool) -> RowReader:
    N, K = shape
    scales = IntegerScales.of(scheme, lines.read(reader), _read_zeros(reader, module, scheme.bits, N))

    def rows(first: int, last: int) -> QuantizedRows:
        words = reader.read_raw(module.parts["weight_packed"], first, last)
        codes_NK = unpack(words, scheme.bits, K) if is_dense else unpack_whole_words(words, scheme.bits, K)
        return scales.rows(codes_NK if order is None else codes_NK.take(order, axis=1), lines.index(first, last))
    return rows


def _read_zeros(reader: TensorReader, module: Module, bits: int, num_outputs: int) -> np.ndarray | None:
    """Unsigned, [lines, groups]; None where there are none. Packed ones lie along N."""
    entry = module.parts.get(ZERO)
    if entry is None:
        return None
    stored = reader.read_raw(entry)
    if entry.dtype == "I8":
        return (stored.astype(np.int16) + middle(bits)).astype(np.uint8)
    words = np.ascontiguousarray(stored.T)
    is_dense = words.shape[1] == _num_words(num_outputs, bits)[0]
    return (unpack if is_dense else unpack_whole_words)(words, bits, num_outputs).T


def _plain_matrix(module: Module, shape: Shape, args: Args) -> StoredMatrix:
    """Signed codes, one a byte, of 8 bits or fewer."""
    module.need("weight", ("I8",), shape)
    lines = _scale_lines(module, shape, args)
    zeros = None if args.is_symmetric else _scale_lines(module, shape, args, part=ZERO, dtypes=("I8",))
    scheme = _scheme(args, lines.entry.dtype, shape[1])
    return matrix_of(module, shape, scheme, functools.partial(_open_plain, module.parts["weight"], scheme, lines=lines, zeros=zeros))


def _open_plain(weight: TensorEntry, scheme: Scheme, reader: TensorReader, *, lines: ScaleLines, zeros: ScaleLines | None) -> RowReader:
    half = middle(scheme.bits)
    unsigned = None if zeros is None else reader.read_raw(zeros.entry).reshape(-1, zeros.num_groups).astype(np.int16) + half
    scales = IntegerScales.of(scheme, lines.read(reader), unsigned)

    def rows(first: int, last: int) -> QuantizedRows:
        codes = (reader.read_raw(weight, first, last).view(np.uint8) + np.uint8(half)).astype(np.uint8, copy=False)
        if codes.size and codes.max() >= 2 * half:
            raise CheckpointError(f"{weight.path}: tensor {weight.name!r} holds codes of more than {scheme.bits} bits; correct num_bits")
        return scales.rows(codes, lines.index(first, last))
    return rows


