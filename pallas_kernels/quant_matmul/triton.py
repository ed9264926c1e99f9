"""The product with 4-bit weights in groups through Pallas' Triton back end, for NVIDIA GPUs other than Hopper."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.pallas_triton import load_triton
from pallas_kernels.quant_matmul.byte_codes import BLOCK, HALF
from pallas_kernels.quant_matmul.packing import PackedArrays, WeightFormat
from pallas_kernels.tiling import Device, choose_tiles

GROUPS = (32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows and outputs of a block, its warps, and how many loads run ahead."""

    rows: int
    outputs: int
    warps: int
    stages: int


def candidates(num_rows: int, num_outputs: int) -> list[Tiles]:
    """Tiles for these shapes, the best known first."""
    rows = [rows for rows in (128, 64, 32, 16) if rows <= max(16, pl.next_power_of_2(num_rows))]
    return [Tiles(rows, outputs, 4, stages) for rows in rows for outputs in (64, 128, 32) for stages in (3, 2) if num_outputs % outputs == 0]


def on_chip_bytes(tiles: Tiles) -> int:
    """Shared memory: activations and codes of the loads on their way."""
    return tiles.stages * BLOCK * (2 * tiles.rows + tiles.outputs)


def triton_matmul(x_MK: jax.Array, _, arrays: PackedArrays, weight_format: WeightFormat, bias_N: jax.Array | None, *, out_dtype, device: Device,
                  interpret: bool) -> jax.Array:
    """[M, N] of activations [M, K]; N and K as they are packed."""
    (M, K), N = x_MK.shape, arrays.codes.shape[0]
    tiles = choose_tiles("quant_matmul_triton", device, (M, N, K, weight_format.group), candidates(M, N), on_chip_bytes)
    rows = pl.cdiv(M, tiles.rows) * tiles.rows
    x_MK = jnp.pad(x_MK, ((0, rows - M), (0, 0))) if rows > M else x_MK
    vectors = [array for array in (arrays.scales, arrays.mins, None if bias_N is None else bias_N[None]) if array is not None]
    params = load_triton().CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages)
    y_MN = pl.pallas_call(
        functools.partial(_body, weight_format=weight_format, has_bias=bias_N is not None),
        out_shape=jax.ShapeDtypeStruct((rows, N), out_dtype), grid=(N // tiles.outputs, rows // tiles.rows),
        in_specs=[pl.BlockSpec((tiles.rows, K), lambda n, m: (m, 0)), pl.BlockSpec((tiles.outputs, K // 2), lambda n, m: (n, 0)),
                  *[pl.BlockSpec((array.shape[0], tiles.outputs), lambda n, m: (0, n)) for array in vectors]],
        out_specs=pl.BlockSpec((tiles.rows, tiles.outputs), lambda n, m: (m, n)), name="quant_matmul",
        compiler_params=params, interpret=interpret)(x_MK, arrays.codes, *vectors)
    return y_MN[:M]


def _body(x_ref, codes_ref, scales_ref, *refs, weight_format: WeightFormat, has_bias: bool):
    f, (*others, out_ref) = weight_format, refs
    width = min(f.group, HALF)

    def add_block(block, sums):
        for byte in range(0, HALF, width):
            codes = codes_ref[:, pl.ds(block * HALF + byte, width)].astype(jnp.int32)
            for half in range(2):
                values = ((codes >> 4) + 8 if half else codes & 15).astype(jnp.float32) - f.zero
                first = block * BLOCK + half * HALF + byte
                scales = scales_ref[first // f.group].astype(jnp.float32)[:, None]
                if f.mins == "none":
                    weight = values * scales
                else:
                    mins = others[0][first // f.group].astype(jnp.float32)[:, None]
                    weight = (values - mins) * scales if f.mins == "zeros" else values * scales + mins
                x = x_ref[:, pl.ds(first, width)]
                sums += jax.lax.dot_general(x, weight.astype(x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return sums
    sums = jax.lax.fori_loop(0, x_ref.shape[1] // BLOCK, add_block, jnp.zeros(out_ref.shape, jnp.float32))
    if has_bias:
        sums += others[-1][0].astype(jnp.float32)[None]
    out_ref[...] = sums.astype(out_ref.dtype)
