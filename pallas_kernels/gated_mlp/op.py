"""The public ops: which implementation runs, on activations of two dims."""
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gated_mlp import gpu, packed_gpu, packed_tpu, tpu
from pallas_kernels.gated_mlp.reference import Activation, gated_product_reference
from pallas_kernels.implementations import REFERENCE, needed_devices, pick, with_gradient_of
from pallas_kernels.precision import matmul_precision
from pallas_kernels.quant_matmul.packing import PackedArrays, WeightFormat, dequantize_packed
from pallas_kernels.tiling import Device

KERNELS = {"mosaic_gpu": gpu, "mosaic_tpu": tpu}
PACKED_KERNELS = {"mosaic_gpu": packed_gpu, "mosaic_tpu": packed_tpu}
LAYOUTS = {"mosaic_gpu": "fragments", "mosaic_tpu": "columns"}
Weight = jax.Array | PackedArrays


def gated_product(x_D: jax.Array, gate: Weight, up: Weight, *, activation: Activation, device: Device, weight_format: WeightFormat | None = None,
                  num_outputs: int | None = None, biases: tuple[jax.Array | None, jax.Array | None] = (None, None),
                  implementation: str | None = None, interpret: bool = False) -> jax.Array:
    """What the down projection multiplies: ``act(x gate.T) * (x up.T)``, in one kernel with one write.

    Args:
        x_D: [..., D] activations.
        gate, up: weights [F, D]; or packed, as ``pallas_kernels.quant_matmul.packing.pack`` gives them, both in one format.
        activation: see :func:`gated`.
        device: what it is compiled for.
        weight_format: of packed weights; None for arrays.
        num_outputs: F, where packed weights are padded beyond it; None for all that they have.
        biases: of gate and up, [F] or None.
        implementation: ``"mosaic_gpu"``, ``"mosaic_tpu"`` or ``"reference"``; None for the best known on this device.
        interpret: whether a kernel is interpreted, on a CPU.

    Returns:
        [..., F] in ``x_D``'s dtype.

    Raises:
        ValueError: the named implementation cannot do what is asked.
    """
    x_MD = x_D.reshape(-1, x_D.shape[-1])
    kernels = KERNELS if weight_format is None else PACKED_KERNELS
    refusals = {name: refusal(name, x_MD, gate, weight_format, device, interpret) for name in kernels}
    chosen = pick("gated_mlp", device, implementation, refusals)
    reference = functools.partial(_reference, activation=activation, weight_format=weight_format, num_outputs=num_outputs)
    if chosen == REFERENCE:
        out_MF = reference(x_MD, gate, up, biases)
    else:
        how = {"activation": activation, "device": device, "interpret": interpret}
        how |= {} if weight_format is None else {"weight_format": weight_format}
        run = functools.partial(_run, kernels[chosen], num_outputs=num_outputs, **how)
        out_MF = with_gradient_of(reference, run)(x_MD, gate, up, biases)
    return out_MF.reshape(*x_D.shape[:-1], -1)


def gated_mlp(x_D: jax.Array, gate_FD: jax.Array, up_FD: jax.Array, down_DF: jax.Array, **how: Any) -> jax.Array:
    """The layer on dense weights; [..., D] in ``x_D``'s dtype. With quantized ones call :func:`gated_product` and ``quant_matmul``.

    Args:
        x_D, gate_FD, up_FD, how: see :func:`gated_product`.
        down_DF: the third weight.
    """
    inner_F = gated_product(x_D, gate_FD, up_FD, **how)
    return jax.lax.dot_general(inner_F, down_DF.astype(x_D.dtype), (((x_D.ndim - 1,), (1,)), ((), ())), preferred_element_type=x_D.dtype,
                               precision=matmul_precision(x_D.dtype))


def refusal(name: str, x_MD: jax.Array, gate: Weight, weight_format: WeightFormat | None, device: Device, interpret: bool) -> str | None:
    """Why a kernel cannot do what is asked; None where it can."""
    kernel, f = KERNELS[name], weight_format
    if needed := needed_devices(name, device, interpret):
        return f"needs {needed}, not {device.kind or device.platform}"
    if not x_MD.shape[0]:
        return "takes at least one row of activations, not none"
    if f is None and gate.dtype != x_MD.dtype:
        return f"takes weights of the dtype of the activations, {x_MD.dtype}, not {gate.dtype}"
    if x_MD.dtype not in kernel.DTYPES:
        return f"takes {' and '.join(kernel.DTYPES)}, not {x_MD.dtype}"
    if f is None:
        is_whole = all(size % kernel.DIM_STEP == 0 for size in gate.shape)
        return None if is_whole else f"takes weights whose dims are multiples of {kernel.DIM_STEP}, not {list(gate.shape)}"
    if f.activations != "float":
        return f"takes weights that multiply activations as they are, not {f.activations} ones; quantize them in two calls of quant_matmul"
    return None if f.layout == LAYOUTS[name] else f"takes weights packed in the layout {LAYOUTS[name]!r}, not {f.layout!r}"


def _run(kernel, x_MD, gate, up, biases, *, num_outputs, **how):
    if how.get("weight_format") is not None:
        N, K = how["weight_format"].shape(gate.codes)
        x_MD = jnp.pad(x_MD, ((0, 0), (0, K - x_MD.shape[1])))
        biases = tuple(None if bias is None else jnp.pad(bias, (0, N - bias.shape[0])) for bias in biases)
    return kernel.gated_product(x_MD, gate, up, biases, **how)[:, :num_outputs]


def _reference(x_MD, gate, up, biases, *, activation, weight_format, num_outputs):
    if weight_format is not None:
        gate, up = (dequantize_packed(weight_format, weight)[:num_outputs, :x_MD.shape[1]] for weight in (gate, up))
    return gated_product_reference(x_MD, gate, up, activation=activation, biases=biases)
