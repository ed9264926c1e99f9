"""The gated product's kernels, interpreted, against the reference in float32."""
import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_mlp import gated_mlp, gated_mlp_reference, gated_product
from pallas_kernels.gated_mlp.cases import CASES, INT4, INT8, PACKED_CASES, RARER_PACKED_CASES, Case
from pallas_kernels.quant_matmul.packing import layout_for
from pallas_kernels.tiling import Device
from tests.pallas_kernels import quick_interpreter
from tests.pallas_kernels.newest import first_is_newest

SEED = random.randrange(2**32)
CPU, A100, H200, V5E = Device("cpu"), Device("gpu", "NVIDIA A100", (8, 0)), Device("gpu", "NVIDIA H200", (9, 0)), Device("tpu", "TPU v5 lite")
KERNELS = {"mosaic_gpu": H200, "mosaic_tpu": V5E}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quick_interpreter.install(monkeypatch)


def jitted(*arrays, **how):
    """:func:`gated_product` in one program."""
    return jax.jit(functools.partial(gated_product, **how))(*arrays)


def assert_close(actual, expected, bound):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(actual).all()
    assert np.linalg.norm(actual - expected) <= bound * np.linalg.norm(expected), f"seed {SEED}"


def check(case, implementation):
    device = KERNELS[implementation]
    x, weights, biases, weight_format = case.arrays(SEED, layout_for(device))
    how = {"activation": case.activation, "device": device, "biases": biases, "weight_format": weight_format,
           "num_outputs": None if weight_format is None else case.F}
    out = jitted(x, *weights, implementation=implementation, interpret=True, **how)
    assert (out.shape, out.dtype) == ((case.M, case.F), x.dtype)
    assert_close(out, jitted(np.asarray(x, np.float32), *weights, implementation="reference", **how), 1e-2)


@pytest.mark.parametrize("case", first_is_newest(CASES), ids=str)
@pytest.mark.parametrize("implementation", KERNELS)
def test_a_kernel_gives_what_the_reference_gives(implementation, case):
    check(case, implementation)


@pytest.mark.parametrize("case", first_is_newest(PACKED_CASES), ids=str)
@pytest.mark.parametrize("implementation", KERNELS)
def test_with_quantized_weights_too(implementation, case):
    check(case, implementation)


@pytest.mark.slow
@pytest.mark.parametrize("case", RARER_PACKED_CASES, ids=str)
@pytest.mark.parametrize("implementation", KERNELS)
def test_with_weights_quantized_in_rarer_ways(implementation, case):
    check(case, implementation)


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(300, 192, 256, dtype="float16"), Case(140, 320, 192, "gelu")], ids=str)
def test_more_rows_than_a_tile_and_an_odd_number_of_warp_groups(case):
    check(case, "mosaic_gpu")


def test_a_row_has_the_same_bits_alone_and_among_others():
    x, weights, _, _ = Case(20, 128, 128).arrays(SEED)
    one, all_ = (jitted(rows, *weights, activation="silu", device=V5E, implementation="mosaic_tpu", interpret=True) for rows in (x[:1], x))
    np.testing.assert_array_equal(np.asarray(one[0], np.float32), np.asarray(all_[0], np.float32))


def test_the_whole_layer_takes_any_leading_dims_and_differentiates_as_the_reference_does():
    rng = np.random.default_rng(SEED)
    x, gate, up, down = (jnp.asarray(rng.normal(size=shape) * 0.1, jnp.bfloat16) for shape in ((2, 3, 128), (128, 128), (128, 128), (128, 128)))

    def loss(implementation, *arrays):
        out = gated_mlp(*arrays, activation="silu", device=V5E, implementation=implementation, interpret=True)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out
    differentiate = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 4), has_aux=True), static_argnums=0)
    (kernel, out), (reference, _) = (differentiate(name, x, gate, up, down) for name in ("mosaic_tpu", "reference"))
    for actual, expected in zip(kernel, reference, strict=True):
        assert_close(actual, expected, 2e-2)
    wanted = jax.jit(functools.partial(gated_mlp_reference, activation="silu"))(x.reshape(6, 128), gate, up, down)
    assert_close(out.reshape(6, 128), wanted, 1e-2)


def test_activations_differentiate_through_quantized_weights():
    x, weights, _, weight_format = PACKED_CASES[2].arrays(SEED, "columns")

    def total(x, implementation):
        out = gated_product(x, *weights, activation="silu", device=V5E, weight_format=weight_format, implementation=implementation, interpret=True)
        return jnp.sum(out.astype(jnp.float32))
    kernel, reference = (jax.jit(jax.grad(total), static_argnums=1)(x, name) for name in ("mosaic_tpu", "reference"))
    assert_close(kernel, reference, 1e-2)


BF16, F32 = jnp.bfloat16, jnp.float32


@pytest.mark.parametrize(("shape", "dtype", "how", "message"), [
    ((1, 128), BF16, {"implementation": "cudnn"}, "no implementation 'cudnn'; there are mosaic_gpu, mosaic_tpu, reference"),
    ((1, 128), BF16, {"implementation": "mosaic_gpu", "device": A100}, "needs a Hopper GPU, not NVIDIA A100"),
    ((1, 128), BF16, {"implementation": "mosaic_tpu", "device": CPU}, "needs a TPU, not cpu"),
    ((1, 128), F32, {"implementation": "mosaic_gpu"}, "takes bfloat16 and float16, not float32"),
    ((1, 128), F32, {"implementation": "mosaic_tpu", "device": V5E}, "takes bfloat16, not float32"),
    ((1, 100), BF16, {"implementation": "mosaic_gpu"}, r"multiples of 64, not \[128, 100\]"),
    ((1, 100), BF16, {"implementation": "mosaic_tpu", "device": V5E}, r"multiples of 128, not \[128, 100\]"),
    ((0, 128), BF16, {"implementation": "mosaic_gpu"}, "takes at least one row"),
])
def test_what_an_implementation_cannot_do_is_refused_with_what_it_can(shape, dtype, how, message):
    weight = jnp.ones((128, shape[1]), dtype)
    with pytest.raises(ValueError, match=message):
        gated_product(jnp.ones(shape, dtype), weight, weight, **{"activation": "silu", "device": H200} | how)


def test_weights_of_another_dtype_are_refused():
    weight = jnp.ones((128, 128), F32)
    with pytest.raises(ValueError, match="weights of the dtype of the activations, bfloat16, not float32"):
        gated_product(jnp.ones((1, 128), BF16), weight, weight, activation="silu", device=H200, implementation="mosaic_gpu")


@pytest.mark.parametrize(("weight_format", "device", "message"), [
    (INT4, H200, "packed in the layout 'fragments', not 'rows'"),
    (INT8, V5E, "packed in the layout 'columns', not 'rows'"),
    (dataclasses.replace(INT8, activations="int8", layout="fragments"), H200, "multiply activations as they are, not int8 ones"),
])
def test_packed_weights_that_a_kernel_does_not_read_are_refused(weight_format, device, message):
    x, weights, _, _ = PACKED_CASES[0].arrays(SEED)
    name = next(name for name, known in KERNELS.items() if known == device)
    with pytest.raises(ValueError, match=message):
        gated_product(x, *weights, activation="silu", device=device, weight_format=weight_format, implementation=name)


def test_where_none_is_named_the_reference_takes_what_kernels_cannot():
    weight = jnp.ones((100, 100), BF16)
    out = gated_product(jnp.ones((2, 100), BF16), weight, weight, activation="relu", device=H200)
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.full((2, 100), 1e4, BF16).astype(np.float32))
