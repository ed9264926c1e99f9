"""The public op: which implementation runs, and what it is given."""
import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import pallas_triton
from pallas_kernels.implementations import REFERENCE, needed_devices, pick, with_gradient_of
from pallas_kernels.quant_matmul import gpu, jax_triton, tpu, triton
from pallas_kernels.quant_matmul.packing import PackedArrays, WeightFormat, dequantize_packed
from pallas_kernels.quant_matmul.reference import quantize_rows
from pallas_kernels.tiling import Device

FLOATS = ("bfloat16", "float16")


def quant_matmul(x_MK: jax.Array, arrays: PackedArrays, *, weight_format: WeightFormat, device: Device, num_outputs: int | None = None,
                 bias: jax.Array | None = None, dtype=None, implementation: str | None = None, interpret: bool = False) -> jax.Array:
    """``x @ w.T + bias`` with a weight that stays quantized in memory.

    Args:
        x_MK: activations, bfloat16 or float16; other floats take the reference. M and K may be any, K as it was before packing.
        arrays: of :func:`pack`; padding of N and K included.
        weight_format: what the arrays are.
        device: what it is compiled for.
        num_outputs: N without padding; None for all there are.
        bias: [N] without padding, added, or None.
        dtype: of the result; None for that of ``x_MK``.
        implementation: ``"mosaic_gpu"`` (layout ``"fragments"``), ``"mosaic_tpu"`` (``"columns"``), ``"triton"`` or ``"jax_triton"`` (``"rows"``, 4
            bits in groups), or ``"reference"``, which makes the dense weight; None for the best known on this device.
        interpret: whether a kernel is interpreted, on a CPU.

    Returns:
        [M, N]. Sums are float32, or whole numbers. A row's result does not depend on other rows or their number. Activations that the weight's format
        has quantized differentiate as if they were not.

    Raises:
        ValueError: the named implementation cannot do what is asked; or shapes that do not fit together.
    """
    _check(x_MK, arrays, weight_format, num_outputs, bias)
    kernels = {"mosaic_gpu": (gpu.gpu_matmul, _refuse_gpu), "mosaic_tpu": (tpu.tpu_matmul, _refuse_tpu),
               "triton": (triton.triton_matmul, _refuse_triton), "jax_triton": (jax_triton.jax_triton_matmul, _refuse_jax_triton)}
    refusals = {name: _refuse_dtype(x_MK, name) or refuse(weight_format, device, interpret) for name, (_, refuse) in kernels.items()}
    chosen = pick("quant_matmul", device, implementation, refusals)
    how = {"weight_format": weight_format, "num_outputs": num_outputs, "dtype": dtype or x_MK.dtype}
    if chosen == REFERENCE:
        return _reference(x_MK, arrays, bias, quantizes=True, **how)
    kernel = functools.partial(kernels[chosen][0], device=device, interpret=interpret)
    reference = functools.partial(_reference, quantizes=False, **how)
    return _differentiable(functools.partial(_kernel, kernel=kernel, **how), reference, x_MK, arrays, bias)


def packed_matmul_reference(x_MK: jax.Array, arrays: PackedArrays, *, weight_format: WeightFormat, num_outputs: int | None = None,
                            bias: jax.Array | None = None, dtype=None) -> jax.Array:
    """:func:`quant_matmul` in plain jnp, computed in float32; activations are quantized where the format says so."""
    return _reference(x_MK, arrays, bias, weight_format=weight_format, num_outputs=num_outputs, dtype=dtype or x_MK.dtype, quantizes=True)


def _differentiable(kernel, reference, x_MK, arrays: PackedArrays, bias):
    """The gradient reaches activations and the bias; the weight is what it is."""
    floats = (x_MK,) if bias is None else (x_MK, bias)

    def with_weight(function, x_MK, bias=None):
        return function(x_MK, jax.lax.stop_gradient(arrays), bias)
    return with_gradient_of(functools.partial(with_weight, reference), functools.partial(with_weight, kernel))(*floats)


def _padded(x_MK: jax.Array, arrays: PackedArrays, weight_format: WeightFormat) -> jax.Array:
    columns = weight_format.shape(arrays.codes)[1] - x_MK.shape[1]
    return jnp.pad(x_MK, ((0, 0), (0, columns))) if columns else x_MK


def _kernel(x_MK, arrays, bias, *, kernel, weight_format, num_outputs, dtype):
    N, _ = weight_format.shape(arrays.codes)
    if bias is not None and bias.shape[0] < N:
        bias = jnp.pad(bias, (0, N - bias.shape[0]))
    codes_MK, row_scales_MB = quantize_rows(_padded(x_MK, arrays, weight_format), weight_format)
    return kernel(codes_MK, row_scales_MB, arrays, weight_format, bias, out_dtype=dtype)[:, :num_outputs]


def _reference(x_MK, arrays, bias, *, weight_format, num_outputs, dtype, quantizes):
    x_MK, f = _padded(x_MK, arrays, weight_format), weight_format
    weight_NK = dequantize_packed(f, arrays)
    if quantizes and f.activations != "float":
        codes_MK, row_scales_MB = quantize_rows(x_MK, f)
        if f.activations == "int8":
            sums_MN = jax.lax.dot_general(codes_MK.astype(jnp.int32), arrays.codes.astype(jnp.int32), (((1,), (f.layout != "columns",)), ((), ())))
            y_MN = sums_MN.astype(jnp.float32) * row_scales_MB * arrays.scales[0].astype(jnp.float32)
            return _with_bias(y_MN, bias, num_outputs).astype(dtype)
        x_MK = codes_MK.astype(jnp.float32) * (jnp.repeat(row_scales_MB, f.group, axis=1) if f.group else row_scales_MB)
    y_MN = jax.lax.dot_general(x_MK.astype(jnp.float32), weight_NK, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
    return _with_bias(y_MN, bias, num_outputs).astype(dtype)


def _with_bias(y_MN, bias, num_outputs):
    y_MN = y_MN[:, :num_outputs]
    return y_MN if bias is None else y_MN + bias.astype(jnp.float32)


def _check(x_MK, arrays, weight_format, num_outputs, bias) -> None:
    N, K = weight_format.shape(arrays.codes)
    if x_MK.ndim != 2 or not K - weight_format.block < x_MK.shape[1] <= K or not math.prod(x_MK.shape):
        raise ValueError(f"activations of shape {x_MK.shape} times a weight packed to {K} inputs; they must be [rows, inputs], at least one row")
    if num_outputs is not None and not 0 < num_outputs <= N:
        raise ValueError(f"num_outputs is {num_outputs}, but the packed weight has {N}")
    if bias is not None and bias.shape != ((num_outputs or N),):
        raise ValueError(f"a bias of shape {bias.shape} for {num_outputs or N} outputs")


def _refuse_dtype(x_MK, implementation: str) -> str | None:
    floats = FLOATS[:1] if implementation == "mosaic_tpu" else FLOATS
    return None if x_MK.dtype in floats else f"takes activations of {' or '.join(floats)}, not {x_MK.dtype}"


def _refuse_gpu(f: WeightFormat, device: Device, interpret: bool) -> str | None:
    if needed := needed_devices("mosaic_gpu", device, interpret):
        return f"needs {needed}, not {device.kind or device.platform}"
    return None if f.layout == "fragments" else f"reads layout 'fragments', not {f.layout!r}"


def _refuse_tpu(f: WeightFormat, device: Device, interpret: bool) -> str | None:
    if needed := needed_devices("mosaic_tpu", device, interpret):
        return f"needs {needed}, not {device.kind or device.platform}"
    if f.activations == "int8" and device.kind.startswith("TPU v4"):
        return "multiplies no int8 on a TPU v4; take activations='float'"
    return None if f.layout == "columns" else f"reads layout 'columns', not {f.layout!r}"


def has_rows_kernel() -> bool:
    """Whether layout ``"rows"`` has a kernel at all: through Pallas, or through jax-triton."""
    return pallas_triton.refusal() is None or jax_triton.refusal() is None


def _refuse_triton(f: WeightFormat, device: Device, interpret: bool) -> str | None:
    return _refuse_rows(f, device, interpret) or pallas_triton.refusal()


def _refuse_rows(f: WeightFormat, device: Device, interpret: bool) -> str | None:
    if not interpret and (device.platform != "gpu" or device.capability is None):
        return f"needs an NVIDIA GPU, not {device.kind or device.platform}"
    if f.bits != 4 or f.group not in triton.GROUPS or f.super_group:
        return f"takes 4 bits in groups of {', '.join(map(str, triton.GROUPS))}, not {f.bits} bits in groups of {f.group}"
    return None if f.layout == "rows" else f"reads layout 'rows', not {f.layout!r}"


def _refuse_jax_triton(f: WeightFormat, device: Device, interpret: bool) -> str | None:
    if interpret:
        return "cannot be interpreted"
    return _refuse_rows(f, device, interpret) or jax_triton.refusal()
