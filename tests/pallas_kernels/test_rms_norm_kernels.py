"""RMSNorm's kernels, interpreted, against the reference in float32."""
import functools
import logging
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import implementations
from pallas_kernels.rms_norm import rms_norm, rms_norm_reference
from pallas_kernels.rms_norm.cases import CASES
from pallas_kernels.rms_norm.op import refusal
from pallas_kernels.tiling import Device
from tests.pallas_kernels import hidden_triton, quick_interpreter
from tests.pallas_kernels.newest import first_is_newest

SEED = random.randrange(2**32)
CPU, A100, H200, V5E = Device("cpu"), Device("gpu", "NVIDIA A100", (8, 0)), Device("gpu", "NVIDIA H200", (9, 0)), Device("tpu", "TPU v5 lite")
KERNELS = {"mosaic_gpu": H200, "mosaic_tpu": V5E, "triton": A100}
BOUNDS = {"float32": 1e-3, "bfloat16": 1e-2, "float16": 1e-2}
ROUNDING = {"int8": lambda y, scale: 0.51 * scale, "float8_e4m3fn": lambda y, scale: np.maximum(np.abs(y) / 15, scale * 2**-9)}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quick_interpreter.install(monkeypatch)


def float32(x):
    return None if x is None else np.asarray(x, np.float32)


def assert_close(actual, expected, bound):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(actual).all()
    assert np.linalg.norm(actual - expected) <= bound * np.linalg.norm(expected), f"seed {SEED}"


@pytest.mark.parametrize("case", first_is_newest(CASES), ids=str)
@pytest.mark.parametrize("implementation", KERNELS)
def test_a_kernel_gives_what_the_reference_gives(implementation, case):
    if implementation == "triton" and case.quantized == "float8_e4m3fn":
        pytest.skip("refused, see below")
    x, weight, residual = case.arrays(SEED)
    how = {"eps": 1e-5, "offset": case.offset}
    kernel = functools.partial(rms_norm, quantized=case.quantized, device=KERNELS[implementation], implementation=implementation, interpret=True)
    out = jax.jit(functools.partial(kernel, **how))(x, weight, residual_D=residual)
    expected = jax.jit(functools.partial(rms_norm_reference, **how))(*map(float32, (x, weight)), residual_D=float32(residual))
    if case.has_residual:
        (out, total), (expected, expected_total) = out, expected
        assert total.dtype == x.dtype
        assert_close(total, expected_total, BOUNDS[case.dtype])
    if case.quantized is None:
        assert out.dtype == x.dtype
        assert_close(out, expected, BOUNDS[case.dtype])
    else:
        codes, scales = out
        assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (case.quantized, x.shape, jnp.float32, x.shape[:-1])
        y, scales = np.asarray(expected), np.asarray(scales)[..., None]
        error = np.abs(np.asarray(codes, np.float32) * scales - y)
        assert (error <= ROUNDING[case.quantized](y, scales) + BOUNDS[case.dtype] * np.abs(y)).all(), f"seed {SEED}"


def test_it_differentiates_as_the_reference_does():
    x, weight, residual = (jnp.asarray(np.random.default_rng(SEED).normal(size=shape), jnp.float32) for shape in ((3, 128), (128,), (3, 128)))

    def loss(x, weight, residual, implementation):
        y, total = rms_norm(x, weight, eps=1e-5, residual_D=residual, device=V5E, implementation=implementation, interpret=True)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.square(total))
    differentiate = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    kernel, reference = (differentiate(x, weight, residual, name) for name in ("mosaic_tpu", "reference"))
    for actual, expected in zip(kernel, reference, strict=True):
        assert_close(actual, expected, 1e-5)


X, WEIGHT = jnp.ones((2, 128)), jnp.ones(128)


@pytest.mark.parametrize(("x", "how", "message"), [
    (X, {"implementation": "cudnn"}, "no implementation 'cudnn'; there are mosaic_gpu, mosaic_tpu, triton, reference"),
    (X, {"implementation": "mosaic_gpu", "device": A100}, "needs a Hopper GPU, not NVIDIA A100"),
    (X, {"implementation": "mosaic_tpu", "device": CPU}, "needs a TPU, not cpu"),
    (X, {"implementation": "triton", "device": Device("gpu", "AMD", None)}, "needs an NVIDIA GPU of compute capability 8.0 or later, not AMD"),
    (X, {"implementation": "triton", "device": A100, "quantized": "float8_e4m3fn"}, "cannot quantize to float8_e4m3fn; it can to int8"),
    (X, {"quantized": "int4"}, "cannot quantize to 'int4'; it can to int8, float8_e4m3fn"),
    (X.astype(jnp.int32), {"implementation": "mosaic_tpu", "device": V5E}, "takes activations of bfloat16, float16, float32, not int32"),
    (jnp.ones((2, 100)), {"implementation": "mosaic_gpu", "device": H200}, "length is a multiple of 128 and at most 16384, not 100"),
    (jnp.ones((2, 16512)), {"implementation": "triton", "device": A100}, "at most 16384, not 16512"),
    (jnp.ones((0, 128)), {"implementation": "mosaic_tpu", "device": V5E}, r"at least one row, not an array of shape \(0, 128\)"),
])
def test_what_an_implementation_cannot_do_is_refused_with_what_it_can(x, how, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(x, WEIGHT, **{"eps": 1e-5, "device": H200} | how)


def test_where_none_is_named_the_reference_takes_what_kernels_cannot_and_the_log_says_so_once(caplog):
    implementations._say.cache_clear()
    x, weight = jnp.ones((2, 16500)), jnp.ones(16500)
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        outs = [rms_norm(x, weight, eps=1e-5, device=H200) for _ in range(2)]
    np.testing.assert_array_equal(outs[0], rms_norm_reference(x, weight, eps=1e-5))
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("rms_norm on NVIDIA H200: reference (mosaic_gpu takes rows whose length is a multiple of 128")


def test_where_jax_has_no_triton_the_reference_is_taken_and_hopper_has_its_own_kernel(monkeypatch, caplog):
    implementations._say.cache_clear()
    hidden_triton.install(monkeypatch)
    with pytest.raises(ValueError, match="'triton' needs Pallas' back end for Triton, which jax "):
        rms_norm(X, WEIGHT, eps=1e-5, device=A100, implementation="triton", interpret=True)
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        np.testing.assert_array_equal(rms_norm(X, WEIGHT, eps=1e-5, device=A100), rms_norm_reference(X, WEIGHT, eps=1e-5))
    assert "rms_norm on NVIDIA A100: reference" in caplog.text
    assert "triton needs Pallas' back end" in caplog.text
    assert refusal("mosaic_gpu", X, H200, None, False) is None
