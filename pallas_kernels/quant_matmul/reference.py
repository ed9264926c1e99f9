"""Products of activations and quantized weights.

    y[m, n] = sum_k x[m, k] w[n, k] + bias[n],   w[n, k] = scale (code[n, k] - zero) + min,   scale and min of k's group, or of the output

With int8 activations (Dettmers et al. 2022, arXiv:2208.07339, without its outliers) each row has one scale, so that sums are of whole numbers:

    y[m, n] = r[m] s[n] sum_k round(x[m, k] / r[m]) code[n, k],   r[m] = max_k abs(x[m, k]) / 127

Activations of E4M3 have a scale a row, or one for each group of inputs.
"""
import jax
import jax.numpy as jnp

from pallas_kernels.quant_matmul.packing import WeightFormat

LARGEST_E4M3 = 448.0


def quant_matmul_reference(x_MK: jax.Array, codes_NK: jax.Array, scales: jax.Array | None = None, mins: jax.Array | None = None, *,
                           group: int = 0, zero: int = 0, bias: jax.Array | None = None, dtype=None) -> jax.Array:
    """``x @ w.T + bias``, computed in float32.

    Args:
        x_MK: activations, any float dtype.
        codes_NK: integers, or floats of any width.
        scales, mins: [N, ceil(K / group)], or [N] where ``group`` is 0; None for 1 and 0.
        group: inputs that share a scale.
        zero: what is taken from each code.
        bias: [N], added, or None.
        dtype: of the result; None for that of ``x_MK``.

    Returns:
        [M, N].
    """
    weight_NK = dequantize_reference(codes_NK, scales, mins, group=group, zero=zero)
    y_MN = jax.lax.dot_general(x_MK.astype(jnp.float32), weight_NK, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
    return (y_MN if bias is None else y_MN + bias.astype(jnp.float32)).astype(dtype or x_MK.dtype)


def dequantize_reference(codes_NK: jax.Array, scales: jax.Array | None, mins: jax.Array | None, *, group: int, zero: int) -> jax.Array:
    """[N, K] float32; arguments as for :func:`quant_matmul_reference`."""
    def spread(values):
        values = values.astype(jnp.float32)
        return jnp.repeat(values, group, axis=1)[:, :codes_NK.shape[1]] if group else values[:, None]
    weight_NK = codes_NK.astype(jnp.float32) - zero
    weight_NK = weight_NK if scales is None else weight_NK * spread(scales)
    return weight_NK if mins is None else weight_NK + spread(mins)


def int8_matmul_reference(x_MK: jax.Array, codes_NK: jax.Array, scales_N: jax.Array, *, dtype=None) -> jax.Array:
    """The product with activations quantized to int8, one scale a row.

    Args:
        x_MK: activations.
        codes_NK: int8.
        scales_N: float32.
        dtype: of the result; None for that of ``x_MK``.

    Returns:
        [M, N].
    """
    codes_MK, row_scales_M = int8_rows(x_MK)
    sums_MN = jax.lax.dot_general(codes_MK.astype(jnp.int32), codes_NK.astype(jnp.int32), (((1,), (1,)), ((), ())))
    return (sums_MN.astype(jnp.float32) * row_scales_M[:, None] * scales_N).astype(dtype or x_MK.dtype)


def int8_rows(x_MK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(codes from -127 to 127 in float32 [M, K], scales [M]) of activations."""
    x32 = x_MK.astype(jnp.float32)
    largest_M = jnp.max(jnp.abs(x32), axis=1)
    inverse_M = jnp.where(largest_M > 0, 127.0 / jnp.where(largest_M > 0, largest_M, 1.0), 0.0)
    codes_MK = jnp.round(jnp.clip(x32 * inverse_M[:, None], -127.0, 127.0))
    return codes_MK, largest_M / jnp.where(largest_M >= 0, 127.0, jnp.nan)  # by a constant XLA would not divide but multiply with its reciprocal


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
