"""Products of activations and quantized weights on a TPU.

The weight lies with its inputs first, so that a group's scale belongs to neighbouring rows of registers. A tile of outputs with all its inputs is
dequantized into vector memory once, and multiplied with one tile of rows after another; int8 weights are multiplied with int8 activations as they
are. Sums run over all of K in the same order, however many rows there are.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quant_matmul.byte_codes import BLOCK, slices
from pallas_kernels.quant_matmul.packing import PackedArrays, WeightFormat
from pallas_kernels.tiling import KIB, Device, choose_tiles

MARGIN_BYTES = 4 * KIB**2
"""Bytes of vector memory left for what the compiler keeps there."""
ROW_ALIGNMENT = 32


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows of activations and outputs that one step multiplies."""

    rows: int
    outputs: int


def candidates(num_rows: int, num_outputs: int) -> list[Tiles]:
    """Tiles for these shapes, the best known first."""
    rows = [rows for rows in (512, 256, 128, 64, 32) if rows <= max(ROW_ALIGNMENT, pl.next_power_of_2(num_rows))]
    return [Tiles(rows, outputs) for rows in rows for outputs in (512, 256, 128) if num_outputs % outputs == 0]


def on_chip_bytes(tiles: Tiles, *, num_inputs: int, weight_format: WeightFormat, item_bytes: int) -> int:
    """Vector memory: blocks twice, what is dequantized once."""
    f, outputs = weight_format, tiles.outputs
    codes = num_inputs * outputs * f.bits // 8
    groups = num_inputs // f.group if f.group else 8
    scales = groups * outputs * 4
    blocks = codes + (1 if f.mins == "none" else 2) * scales + tiles.rows * num_inputs * item_bytes + 4 * tiles.rows * outputs
    dense = 0 if f.activations == "int8" else 2 * num_inputs * outputs + 2 * scales
    return 2 * blocks + dense + 4 * tiles.rows * outputs + MARGIN_BYTES


def tpu_matmul(x_MK: jax.Array, row_scales_MB: jax.Array | None, arrays: PackedArrays, weight_format: WeightFormat, bias_N: jax.Array | None, *,
               out_dtype, device: Device, interpret: bool) -> jax.Array:
    """[M, N] of activations [M, K], or of their codes and scales [M, 1 or groups]; N and K as they are packed."""
    (M, K), N, f = x_MK.shape, weight_format.shape(arrays.codes)[0], weight_format
    key = (M, N, K, f.bits, f.kind, f.group, f.mins, f.activations, str(x_MK.dtype))
    needed = functools.partial(on_chip_bytes, num_inputs=K, weight_format=f, item_bytes=2 if f.group else x_MK.dtype.itemsize)
    tiles = choose_tiles("quant_matmul", device, key, candidates(M, N), needed)
    rows = pl.cdiv(M, tiles.rows) * tiles.rows
    inputs = {name: jax.lax.bitcast_convert_type(array, jnp.int16) if array.dtype == jnp.float16 else array
              for name, array in arrays._asdict().items() if array is not None}
    if f.activations == "e4m3" and f.group:  # no chip multiplies fp8: what the codes stand for loses less than the weight does
        x_MK, row_scales_MB = (x_MK.astype(jnp.float32) * jnp.repeat(row_scales_MB, f.group, axis=1)).astype(jnp.bfloat16), None
    inputs = {"x": x_MK, "row_scales": row_scales_MB, **inputs, "bias": None if bias_N is None else bias_N[None]}
    inputs = {name: array for name, array in inputs.items() if array is not None}

    def spec(name: str) -> pl.BlockSpec:
        array = inputs[name]
        if name in ("x", "row_scales"):
            return pl.BlockSpec((tiles.rows, array.shape[1]), lambda n, m: (m, 0))
        return pl.BlockSpec((array.shape[0], tiles.outputs), lambda n, m: (0, n))
    for name in ("x", "row_scales"):
        if name in inputs and rows > M:
            inputs[name] = jnp.pad(inputs[name], ((0, rows - M), (0, 0)))
    has_dense = f.activations != "int8"
    groups = K // f.group if f.group else 1
    scratch = [pltpu.VMEM((K, tiles.outputs), jnp.bfloat16), *[pltpu.VMEM((groups, tiles.outputs), jnp.float32)] * 2] if has_dense else []
    y_MN = pl.pallas_call(
        functools.partial(_body, names=tuple(inputs), weight_format=f),
        out_shape=jax.ShapeDtypeStruct((rows, N), out_dtype), grid=(N // tiles.outputs, rows // tiles.rows), in_specs=[spec(name) for name in inputs],
        out_specs=pl.BlockSpec((tiles.rows, tiles.outputs), lambda n, m: (m, n)), scratch_shapes=scratch, name="quant_matmul",
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=needed(tiles) + MARGIN_BYTES),
        interpret=pltpu.InterpretParams() if interpret else False)(*inputs.values())
    return y_MN[:M]


def _body(*refs, names: tuple[str, ...], weight_format: WeightFormat):
    f, has_dense = weight_format, weight_format.activations != "int8"
    inputs, (out_ref, *scratch) = dict(zip(names, refs, strict=False)), refs[len(names):]
    if has_dense:
        weight_ref, scales_ref, mins_ref = scratch
        pl.when(pl.program_id(1) == 0)(lambda: dequantize(inputs, weight_ref, scales_ref, mins_ref, f))

    y = product(inputs["x"], weight_ref if has_dense else inputs["codes"], out_ref.shape, jnp.float32 if has_dense else jnp.int32)
    y = y.astype(jnp.float32)
    if "row_scales" in inputs:
        y = y * inputs["row_scales"][...]
    if not f.group:
        y = y * inputs["scales"][...].astype(jnp.float32)
    y = y + inputs["bias"][...].astype(jnp.float32) if "bias" in inputs else y
    out_ref[...] = y.astype(out_ref.dtype)


def product(x_ref, weight_ref, shape, dtype):
    """x [rows, K] times a weight [K, outputs], some inputs after the other: the compiler unrolls a product."""
    num_inputs = weight_ref.shape[0]
    chunk = next(size for size in (2048, 1792, 1536, 1408, 1024, 512, 256, 128) if num_inputs % size == 0)

    def add(i, sums):
        some = pl.ds(pl.multiple_of(i * chunk, BLOCK), chunk)
        x, weight = x_ref[:, some], weight_ref[some]
        x = x.astype(jnp.float32).astype(weight.dtype) if x.dtype != weight.dtype else x
        return sums + jax.lax.dot_general(x, weight, (((1,), (0,)), ((), ())), preferred_element_type=dtype)
    return jax.lax.fori_loop(0, num_inputs // chunk, add, jnp.zeros(shape, dtype))


def dequantize(inputs, weight_ref, scales_ref, mins_ref, f: WeightFormat) -> None:
    """Fill ``weight_ref`` [K, outputs], a block of inputs after the other."""
    if f.group:
        _expand_scales(inputs, scales_ref, mins_ref, f)
    block = 2 * BLOCK if f.bits == 5 else BLOCK
    width = BLOCK if f.bits == 8 else 64 if f.bits == 4 else 32

    def one_block(i, _):
        for piece in slices(f.bits, width, block):
            values = _codes(inputs["codes"], i * (block if f.bits == 8 else block // 2) + piece.byte, width, piece.mask)
            if piece.high_byte is not None:
                high = _codes(inputs["high"], i * (block * (f.bits - 4) // 8) + piece.high_byte, width, piece.high_mask)
                values = values + high * piece.high_scale
            values = values * piece.scale + (piece.offset - f.zero) if f.bits != 8 else values
            group = min(f.group or width, width)
            for first in range(0, width, group):
                part, k = values[first:first + group], i * block + piece.first + first
                if f.group:
                    row = pl.ds(i * (block // f.group) + (piece.first + first) // f.group if f.group <= block else i >> 1, 1)
                    part = part * scales_ref[row]
                    part = part if f.mins == "none" else part + mins_ref[row]
                weight_ref[pl.ds(pl.multiple_of(k, 16), group)] = part.astype(weight_ref.dtype)
        return _
    jax.lax.fori_loop(0, weight_ref.shape[0] // block, one_block, 0)


def _codes(ref, first, width: int, mask: int | None):
    """float32 of some rows of codes, masked."""
    codes = ref[pl.ds(pl.multiple_of(first, 32), width)]
    if mask is None:
        return codes.astype(jnp.float32)
    return (codes.astype(jnp.int32) & mask).astype(jnp.float32)


def _expand_scales(inputs, scales_ref, mins_ref, f: WeightFormat) -> None:
    """Fill the scales and mins of groups, as float32."""
    for name, target in (("scales", scales_ref), ("mins", mins_ref)):
        if name not in inputs:
            continue
        target[...] = as_float(inputs[name][...])
        if f"super_{name}" in inputs:
            supers, ratio = as_float(inputs[f"super_{name}"][...]), f.super_group // f.group
            for i in range(supers.shape[0]):
                some = slice(i * ratio, (i + 1) * ratio)
                target[some] = target[some] * supers[i:i + 1]
    if f.mins == "zeros":
        mins_ref[...] = -scales_ref[...] * mins_ref[...]
    elif f.mins == "super":
        mins_ref[...] = -mins_ref[...]


def as_float(values):
    """float32 of floats, small integers, or the bits of float16 in int16, which TPUs do not load."""
    if values.dtype != jnp.int16:
        return (values.astype(jnp.int32) if jnp.issubdtype(values.dtype, jnp.integer) else values).astype(jnp.float32)
    bits = values.astype(jnp.int32)
    size = bits & 0x7FFF
    normal = jax.lax.bitcast_convert_type((size << 13) + (112 << 23), jnp.float32)
    floats = jnp.where(size < 0x400, size.astype(jnp.float32) * 2.0**-24, normal)
    return jnp.where(bits < 0, -floats, floats)
