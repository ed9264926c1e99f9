"""RMSNorm of a Hopper GPU in Mosaic GPU: a warp group holds a row in its registers, and reads and writes it once."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.interpreter import gpu_interpreter
from pallas_kernels.rms_norm.reference import results, round_codes, scale_rows
from pallas_kernels.tiling import Device, choose_tiles

THREADS = 128  # of a warp group
LONGEST_ROW = 16384


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How many rows a block normalizes, one after the other, with the weight in registers."""

    rows: int


CANDIDATES = tuple(map(Tiles, (1, 2, 4, 8)))
REDUCTION_BYTES = 2048


def refusal(row_length: int, _: str | None) -> str | None:
    """Why rows of this length cannot be normalized; None where they can."""
    if row_length % THREADS or row_length > LONGEST_ROW:
        return f"takes rows whose length is a multiple of {THREADS} and at most {LONGEST_ROW}, not {row_length}"
    return None


def rms_norm_rows(x_MD: jax.Array, weight_D: jax.Array, residual_MD: jax.Array | None, *, eps: float, offset: float, quantized: str | None,
                  device: Device, interpret: bool) -> tuple[jax.Array, ...]:
    """(y or codes [M, D], scales [M, 1] of codes, x + residual where there is one)."""
    M, D = x_MD.shape
    key = (M, D, str(x_MD.dtype), str(quantized), int(residual_MD is not None))
    tiles = choose_tiles("rms_norm", device, key, CANDIDATES, lambda tiles: REDUCTION_BYTES)
    arrays, outs = [x for x in (x_MD, weight_D, residual_MD) if x is not None], results(x_MD, residual_MD, quantized, (M,))
    body = functools.partial(_body, tiles=tiles, eps=eps, offset=offset, quantized=quantized, has_residual=residual_MD is not None)
    return tuple(plgpu.kernel(body, out_type=outs, grid=(pl.cdiv(M, tiles.rows),), grid_names=("block",), interpret=gpu_interpreter(interpret),
                              kernel_name="rms_norm", compiler_params=plgpu.CompilerParams(
                                  lowering_semantics=plgpu.LoweringSemantics.Warpgroup, reduction_scratch_bytes=REDUCTION_BYTES))(*arrays))


def _body(x_gmem, weight_gmem, *gmem, tiles, eps, offset, quantized, has_residual):
    M, D = x_gmem.shape
    first = jax.lax.axis_index("block") * tiles.rows
    weight = weight_gmem[...].astype(jnp.float32) + offset

    @pl.loop(first, jnp.minimum(first + tiles.rows, M))
    def _row(row):
        outs = gmem
        x = x_gmem[row]
        if has_residual:
            residual_gmem, *outs = gmem
            x = x + residual_gmem[row]
            outs[-1][row] = x
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.sum(x32 * x32) * (1 / D) + eps)
        y = x32 * scale * weight
        if quantized is None:
            outs[0][row] = y.astype(outs[0].dtype)
        else:
            scaled, row_scale = scale_rows(y, quantized)
            outs[0][row] = round_codes(scaled, quantized)
            outs[1][row] = row_scale[0]
