"""The public op: which implementation runs, on rows of two dims."""
import functools
import math

import jax

from pallas_kernels.implementations import REFERENCE, needed_devices, pick, with_gradient_of
from pallas_kernels.rms_norm import gpu, tpu, triton
from pallas_kernels.rms_norm.reference import LARGEST, rms_norm_reference
from pallas_kernels.tiling import Device

KERNELS = {"mosaic_gpu": gpu, "mosaic_tpu": tpu, "triton": triton}
DTYPES = ("bfloat16", "float16", "float32")


def rms_norm(x_D: jax.Array, weight_D: jax.Array, *, eps: float, device: Device, residual_D: jax.Array | None = None, offset: float = 0.0,
             quantized: str | None = None, implementation: str | None = None, interpret: bool = False):
    """RMSNorm over the last dim; see :func:`rms_norm_reference` for the arguments and the result.

    Args:
        device: what it is compiled for.
        implementation: ``"mosaic_gpu"``, ``"mosaic_tpu"``, ``"triton"`` or ``"reference"``; None for the best known on this device.
        interpret: whether a kernel is interpreted, on a CPU.

    Raises:
        ValueError: the named implementation cannot do what is asked; or a dtype to quantize to that is none.
    """
    if quantized is not None and quantized not in LARGEST:
        raise ValueError(f"rms_norm: cannot quantize to {quantized!r}; it can to {', '.join(LARGEST)}")
    refusals = {name: refusal(name, x_D, device, quantized, interpret) for name in KERNELS}
    chosen = pick("rms_norm", device, implementation, refusals)
    reference = functools.partial(_reference, eps=eps, offset=offset, quantized=quantized)
    arrays = (x_D, weight_D) if residual_D is None else (x_D, weight_D, residual_D)
    if chosen == REFERENCE:
        return reference(*arrays)
    run = functools.partial(_on_rows, KERNELS[chosen].rms_norm_rows, eps=eps, offset=offset, quantized=quantized, device=device, interpret=interpret)
    return with_gradient_of(reference, run)(*arrays)


def refusal(name: str, x_D: jax.Array, device: Device, quantized: str | None, interpret: bool) -> str | None:
    """Why a kernel cannot do what is asked; None where it can."""
    if needed := needed_devices(name, device, interpret):
        return f"needs {needed}, not {device.kind or device.platform}"
    if x_D.dtype not in DTYPES:
        return f"takes activations of {', '.join(DTYPES)}, not {x_D.dtype}"
    if not math.prod(x_D.shape):
        return f"takes at least one row, not an array of shape {x_D.shape}"
    return KERNELS[name].refusal(x_D.shape[-1], quantized)


def _reference(x_D, weight_D, residual_D=None, **how):
    return rms_norm_reference(x_D, weight_D, residual_D=residual_D, **how)


def _on_rows(kernel, x_D, weight_D, residual_D=None, **how):
    """The kernel takes rows [M, D] and gives a tuple: y or codes and scales [M, 1], then the sum."""
    lead, D = x_D.shape[:-1], x_D.shape[-1]
    outs = kernel(x_D.reshape(-1, D), weight_D, None if residual_D is None else residual_D.astype(x_D.dtype).reshape(-1, D), **how)
    y, *rest = outs
    y = y.reshape(x_D.shape)
    if how["quantized"] is not None:
        y = y, rest.pop(0).reshape(lead)
    return y if residual_D is None else (y, rest[0].reshape(x_D.shape))


