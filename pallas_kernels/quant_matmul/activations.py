"""Activations quantized for products of 8-bit numbers.

    code[m, k] = round(x[m, k] / r[m, k // group]),   r[m, g] = max_{k of g} abs(x[m, k]) / largest code
"""
import jax
import jax.numpy as jnp

from pallas_kernels.quant_matmul.packing import WeightFormat
from pallas_kernels.quant_matmul.reference import int8_rows

LARGEST_E4M3 = 448.0


def quantize_rows(x_MK: jax.Array, weight_format: WeightFormat) -> tuple[jax.Array, jax.Array | None]:
    """(codes [M, K], float32 scales [M, 1 or groups]) as a weight's format wants them; (activations, None) where it wants floats."""
    if weight_format.activations == "float":
        return x_MK, None
    if weight_format.activations == "int8":
        codes_MK, scales_M = int8_rows(x_MK)
        return codes_MK.astype(jnp.int8), scales_M[:, None]
    return e4m3_rows(x_MK, weight_format.group)


def e4m3_rows(x_MK: jax.Array, group: int = 0) -> tuple[jax.Array, jax.Array]:
    """(e4m3 codes [M, K], float32 scales [M, 1], or [M, K / group]) of activations."""
    M, K = x_MK.shape
    x_MBG = x_MK.astype(jnp.float32).reshape(M, -1, group or K)
    largest_MB = jnp.max(jnp.abs(x_MBG), axis=2)
    inverse_MB = jnp.where(largest_MB > 0, LARGEST_E4M3 / jnp.where(largest_MB > 0, largest_MB, 1.0), 0.0)
    codes_MBG = jnp.clip(x_MBG * inverse_MB[:, :, None], -LARGEST_E4M3, LARGEST_E4M3)
    return codes_MBG.astype(jnp.float8_e4m3fn).reshape(M, K), largest_MB * (1 / LARGEST_E4M3)
