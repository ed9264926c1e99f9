"""LayerNorm against float64, the reference and what the platform takes."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.layer_norm import layer_norm_reference
from sharding_rules import ONE_DEVICE
from tpllm import ops


def arrays(shape, dtype):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=shape) * 3 + 1, dtype), *(jnp.asarray(mean + 0.2 * rng.normal(size=shape[-1]), dtype) for mean in (1, 0)))


@pytest.mark.parametrize("norm", [layer_norm_reference, lambda *arrays, eps: ops.layer_norm(*arrays, eps=eps, partition=ONE_DEVICE)],
                         ids=["reference", "ops"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2**-7), ("float16", 2**-10)])
@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 3, 64)])
def test_layer_norm_is_the_formula_in_float64(shape, dtype, tolerance, norm):
    x, weight, bias = arrays(shape, dtype)
    x64, weight64, bias64 = (np.asarray(array, np.float64) for array in (x, weight, bias))
    centered = x64 - x64.mean(-1, keepdims=True)
    out = norm(x, weight, bias, eps=1e-3)
    assert out.dtype == x.dtype
    expected = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-3) * weight64 + bias64
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=tolerance, atol=tolerance)


def test_its_gradients_are_those_of_the_reference():
    inputs = arrays((2, 3, 24), "float32")
    ours, wanted = (jax.grad(lambda *inputs, norm=norm: (norm(*inputs) ** 3).sum(), argnums=(0, 1, 2))(*inputs) for norm in (
        lambda *inputs: ops.layer_norm(*inputs, eps=1e-3, partition=ONE_DEVICE), lambda *inputs: layer_norm_reference(*inputs, eps=1e-3)))
    for gradient, expected in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)
