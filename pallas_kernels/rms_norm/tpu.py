"""RMSNorm of a TPU: blocks of whole rows in vector memory."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.rms_norm.reference import results, round_codes, scale_rows
from pallas_kernels.tiling import KIB, Device, choose_tiles

LANES = 128
SPARE = 2 * KIB**2


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How many rows a step normalizes."""

    rows: int


CANDIDATES = tuple(map(Tiles, (128, 256, 64, 32)))  # 32: a tile of 8-bit codes


def refusal(_: int, __: str | None) -> None:
    """It takes rows of any length."""


def on_chip_bytes(tiles: Tiles, D: int, itemsize: int, num_blocks: int) -> int:
    """Two buffers of each block, and the float32 rows that the body holds."""
    padded = pl.cdiv(D, LANES) * LANES
    return tiles.rows * (padded * (2 * num_blocks * itemsize + 4 * 4) + 2 * LANES * 4) + SPARE


def rms_norm_rows(x_MD: jax.Array, weight_D: jax.Array, residual_MD: jax.Array | None, *, eps: float, offset: float, quantized: str | None,
                  device: Device, interpret: bool) -> tuple[jax.Array, ...]:
    """(y or codes [M, D], scales [M, 1] of codes, x + residual where there is one)."""
    M, D = x_MD.shape
    num_blocks = 2 + 2 * (residual_MD is not None)
    needed = functools.partial(on_chip_bytes, D=D, itemsize=x_MD.dtype.itemsize, num_blocks=num_blocks)
    tiles = choose_tiles("rms_norm", device, (M, D, str(x_MD.dtype), str(quantized), num_blocks), CANDIDATES, needed)
    rows = min(tiles.rows, M)
    arrays, outs = [x for x in (x_MD, weight_D[None], residual_MD) if x is not None], results(x_MD, residual_MD, quantized, (M, 1))
    block, weight_block = pl.BlockSpec((rows, D), lambda i: (i, 0)), pl.BlockSpec((1, D), lambda i: (0, 0))
    blocks, out_blocks = [block, weight_block, block][:len(arrays)], [pl.BlockSpec((rows, out.shape[1]), lambda i: (i, 0)) for out in outs]
    body = functools.partial(_body, eps=eps, offset=offset, quantized=quantized, has_residual=residual_MD is not None)
    params = pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=needed(tiles))
    return tuple(pl.pallas_call(body, grid=(pl.cdiv(M, rows),), in_specs=blocks, out_specs=out_blocks, out_shape=outs, name="rms_norm",
                                interpret=pltpu.InterpretParams() if interpret else False, compiler_params=params)(*arrays))


def _body(x_ref, weight_ref, *refs, eps, offset, quantized, has_residual):
    x = x_ref[...]
    if has_residual:
        residual_ref, *refs = refs
        x = x + residual_ref[...]
        refs[-1][...] = x
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.sum(x32 * x32, axis=1, keepdims=True) * (1 / x.shape[1]) + eps)
    y = x32 * scale * (weight_ref[...].astype(jnp.float32) + offset)
    if quantized is None:
        refs[0][...] = y.astype(refs[0].dtype)
    else:
        scaled, row_scale = scale_rows(y, quantized)
        refs[0][...] = round_codes(scaled, quantized)
        refs[1][...] = row_scale
