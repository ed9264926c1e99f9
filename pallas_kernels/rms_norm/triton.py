"""RMSNorm of NVIDIA GPUs of which Mosaic GPU knows nothing, through Pallas' route to Triton: one row a block."""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import pallas_triton
from pallas_kernels.rms_norm.reference import results, scale_rows
from pallas_kernels.tiling import Device

LONGEST_ROW = 16384  # is held in registers


def refusal(row_length: int, quantized: str | None) -> str | None:
    """Why rows of this length cannot be normalized; None where they can."""
    if quantized == "float8_e4m3fn":
        return "cannot quantize to float8_e4m3fn; it can to int8"
    return f"takes rows of at most {LONGEST_ROW}, not {row_length}" if row_length > LONGEST_ROW else pallas_triton.refusal()


def rms_norm_rows(x_MD: jax.Array, weight_D: jax.Array, residual_MD: jax.Array | None, *, eps: float, offset: float, quantized: str | None,
                  device: Device, interpret: bool) -> tuple[jax.Array, ...]:
    """(y or codes [M, D], scales [M] of codes, x + residual where there is one)."""
    M, D = x_MD.shape
    arrays, outs = [x for x in (x_MD, weight_D, residual_MD) if x is not None], results(x_MD, residual_MD, quantized, (M,))
    body = functools.partial(_body, eps=eps, offset=offset, quantized=quantized, has_residual=residual_MD is not None)
    num_warps = max(1, min(16, pl.next_power_of_2(D) // 512))
    return tuple(pl.pallas_call(body, grid=(M,), out_shape=outs, interpret=interpret, name="rms_norm",
                                compiler_params=pallas_triton.load_triton().CompilerParams(num_warps=num_warps, num_stages=1))(*arrays))


def _body(x_ref, weight_ref, *refs, eps, offset, quantized, has_residual):
    plgpu = pallas_triton.load_triton()
    row, D = pl.program_id(0), x_ref.shape[1]
    columns = jnp.arange(pl.next_power_of_2(D))
    is_there = columns < D
    x = plgpu.load(x_ref.at[row, columns], mask=is_there, other=0.0)
    if has_residual:
        residual_ref, *refs = refs
        x = x + plgpu.load(residual_ref.at[row, columns], mask=is_there, other=0.0)
        plgpu.store(refs[-1].at[row, columns], x, mask=is_there)
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.sum(x32 * x32, axis=0) * (1 / D) + eps)
    y = x32 * scale * (plgpu.load(weight_ref.at[columns], mask=is_there, other=0.0).astype(jnp.float32) + offset)
    y = jnp.where(is_there, y, 0.0)
    if quantized is None:
        plgpu.store(refs[0].at[row, columns], y.astype(refs[0].dtype), mask=is_there)
    else:
        scaled, row_scale = scale_rows(y, quantized)
        plgpu.store(refs[0].at[row, columns], jnp.floor(scaled + 0.5).astype(refs[0].dtype), mask=is_there)
        plgpu.store(refs[1].at[row], jnp.sum(row_scale))
