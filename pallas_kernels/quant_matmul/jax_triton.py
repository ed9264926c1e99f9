# ruff: noqa: F821  -- Triton's language is a global only once it is imported
"""The product with 4-bit weights in groups as a Triton kernel, called through jax-triton: optional, and imported only when it is used."""
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quant_matmul.packing import PackedArrays, WeightFormat
from pallas_kernels.quant_matmul.triton import candidates, on_chip_bytes
from pallas_kernels.tiling import Device, choose_tiles

PTX_VERSION = 90
"""What is written: Triton knows newer ones than the assembler of XLA."""
INSTALL = "pip install 'jax-triton>=0.4' 'triton>=3.7', with jax 0.11 or later"


@functools.cache
def refusal() -> str | None:
    """Why jax-triton cannot be used; None where it can."""
    try:
        jax_triton, *_ = _modules()
    except Exception as error:  # an old jax-triton fails in many ways where no GPU is
        return f"needs jax-triton: {INSTALL} (importing it: {type(error).__name__}: {error})"
    takes_types = "out_type" in inspect.signature(jax_triton.triton_call).parameters
    return None if takes_types else f"needs a newer jax-triton: {INSTALL}"


def _modules() -> tuple[Any, Any, Any]:
    import jax_triton
    import triton
    import triton.language
    return jax_triton, triton, triton.language


@functools.cache
def _kernel():
    """The kernel; Triton reads its source, in which ``tl`` must be a global."""
    _, triton, language = _modules()
    globals()["tl"] = language
    return triton.jit(_body)


def jax_triton_matmul(x_MK: jax.Array, _, arrays: PackedArrays, weight_format: WeightFormat, bias_N: jax.Array | None, *, out_dtype, device: Device,
                      interpret: bool) -> jax.Array:
    """[M, N] of activations [M, K]; N and K as they are packed.

    Raises:
        ValueError: jax-triton cannot be used; what to install.
    """
    if interpret or refusal():
        raise ValueError(f"quant_matmul: implementation 'jax_triton' {refusal() or 'cannot be interpreted'}")
    (M, K), N, f = x_MK.shape, arrays.codes.shape[0], weight_format
    tiles = choose_tiles("quant_matmul_jax_triton", device, (M, N, K, f.group), candidates(M, N), on_chip_bytes)
    row_tiles = -(-M // tiles.rows)
    vectors = [arrays.scales, arrays.scales if arrays.mins is None else arrays.mins, arrays.scales if bias_N is None else bias_N]
    return _modules()[0].triton_call(
        x_MK, arrays.codes, *vectors, kernel=_kernel(), out_type=jax.ShapeDtypeStruct((M, N), jnp.dtype(out_dtype)),
        grid=(N // tiles.outputs, row_tiles), num_warps=tiles.warps, num_stages=tiles.stages,
        backend_options={"ptx_version": PTX_VERSION}, M=M, N=N, K=K, GROUP=f.group, ZERO=f.zero,
        MINS={"none": 0, "float": 1, "zeros": 2}[f.mins], HAS_BIAS=bias_N is not None, ROWS=tiles.rows, OUTPUTS=tiles.outputs, WIDTH=min(f.group, 64))


def _body(x_pointer, codes_pointer, scales_pointer, mins_pointer, bias_pointer, out_pointer, M: "tl.constexpr", N: "tl.constexpr",
          K: "tl.constexpr", GROUP: "tl.constexpr", ZERO: "tl.constexpr", MINS: "tl.constexpr", HAS_BIAS: "tl.constexpr",
          ROWS: "tl.constexpr", OUTPUTS: "tl.constexpr", WIDTH: "tl.constexpr"):
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inputs = tl.arange(0, WIDTH)
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for byte in range(0, K // 2, WIDTH):
        codes = tl.load(codes_pointer + outputs[None, :] * (K // 2) + byte + inputs[:, None]).to(tl.int32)
        for half in tl.static_range(2):
            values = (codes & 15).to(tl.float32)
            if half == 1:
                values = (codes >> 4).to(tl.float32) + 8
            first = byte // 64 * 128 + half * 64 + byte % 64
            scales = tl.load(scales_pointer + first // GROUP * N + outputs).to(tl.float32)[None, :]
            weight = (values - ZERO) * scales
            if MINS != 0:
                mins = tl.load(mins_pointer + first // GROUP * N + outputs).to(tl.float32)[None, :]
                if MINS == 1:
                    weight = values * scales + mins
                else:
                    weight = (values - mins) * scales
            x = tl.load(x_pointer + rows[:, None] * K + first + inputs[None, :], mask=rows[:, None] < M, other=0.0)
            sums += tl.dot(x, weight.to(x.dtype))
    if HAS_BIAS:
        sums += tl.load(bias_pointer + outputs).to(tl.float32)[None, :]
    tl.store(out_pointer + rows[:, None] * N + outputs[None, :], sums.to(out_pointer.dtype.element_ty), mask=rows[:, None] < M)
