"""RMSNorm against float64."""
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rms_norm import rms_norm_reference


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-8), ("float16", 2**-11)])
@pytest.mark.parametrize("shape", [(1, 5), (2, 3, 64), (2, 3, 4, 16)])
def test_rms_norm_is_the_formula_in_float64(shape, dtype, tolerance):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape) * 3, dtype)
    weight = jnp.asarray(1 + 0.2 * rng.normal(size=shape[-1]), dtype)
    x64, weight64 = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5) * weight64
    out = rms_norm_reference(x, weight, eps=1e-5)
    assert out.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=tolerance, atol=tolerance * 1e-2)


def test_the_mean_of_large_16_bit_values_does_not_overflow():
    x = jnp.full((1, 8), 6e4, jnp.float16)  # its square is beyond float16
    np.testing.assert_allclose(np.asarray(rms_norm_reference(x, jnp.ones(8, jnp.float16), eps=1e-6)), 1, rtol=1e-3)


def test_a_row_of_zeros_stays_zero():
    assert not np.asarray(rms_norm_reference(jnp.zeros((2, 8)), jnp.ones(8), eps=1e-6)).any()
