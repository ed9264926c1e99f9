"""The gated MLP, the norm and row sums against the references, on every instruction set."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_mlp import ClampedGlu, gated_mlp_reference
from pallas_kernels.quant_matmul import quant_matmul_reference
from pallas_kernels.rms_norm import rms_norm_reference
from sharding_rules import ONE_DEVICE
from tests.native.cases import Case, k_quant, make_weight
from tpllm import ops
from tpllm.native import attention
from tpllm.weights import native_products as products
from tpllm.weights.native import Format

D, F = 96, 160
FORMATS = {
    "F32": {"format": Format.F32}, "F16": {"format": Format.F16}, "BF16": {"format": Format.BF16},
    "I8": {"format": Format.I8, "scale_dtype": "float32"}, "E4M3": {"format": Format.E4M3, "scale_dtype": "float32"},
    "I4": {"format": Format.I4, "group": 32, "zero": 8, "scale_dtype": "float16"},
    "E2M1": {"format": Format.E2M1, "group": 32, "scale_dtype": "uint8"},
    "Q5 mins": {"format": Format.Q5, "group": 32, "has_mins": True, "scale_dtype": "float16"},
    "int8 inputs": {"format": Format.I8, "scale_dtype": "float32", "quantizes_input": True},
}
run_mlp = jax.jit(products.gated_mlp, static_argnames="activation")
run_norm = jax.jit(attention.rms_norm, static_argnames="eps")


@functools.cache
def layer(name, d=D, f=F):
    """Packed gate, up and down, and dense ones."""
    cases = [Case(**FORMATS[name], num_outputs=n, num_inputs=k) for n, k in ((f, d), (f, d), (d, f))]
    made = [make_weight(case, seed) for seed, case in enumerate(cases)]
    return tuple(packed for packed, _ in made), tuple(jnp.asarray(canonical.dense()) for _, canonical in made)


def inputs(num_rows, dtype="float32", d=D):
    return jnp.asarray(np.random.default_rng(0).standard_normal((num_rows, d), np.float32), dtype)


def error(out, expected):
    out, expected = (np.asarray(x).astype(np.float64) for x in (out, expected))
    return np.linalg.norm(out - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gated_mlp_is_its_reference_whatever_the_number_of_rows(name, dtype, instruction_set):
    packed, dense = layer(name)
    x = inputs(64, dtype)
    out = np.asarray(run_mlp(x, packed, (None,) * 3, activation="silu"))
    assert out.dtype == dtype
    assert error(out, gated_mlp_reference(x, *dense, activation="silu")) < (2e-2 if name == "int8 inputs" else 2e-3)
    for num_rows in (1, 2, 7, 8):
        assert np.asarray(run_mlp(x[3:3 + num_rows], packed, (None,) * 3, activation="silu")).tobytes() == out[3:3 + num_rows].tobytes()


@pytest.mark.parametrize("activation", [*products.ACTIVATIONS, ClampedGlu(7.0), ClampedGlu(0.5, 1.0)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_each_activation_is_that_of_the_reference(activation, scale, instruction_set):
    packed, dense = layer("F32", 33, 7)
    x = scale * inputs(5, d=33)
    out = run_mlp(x, packed, (None,) * 3, activation=activation)
    np.testing.assert_allclose(out, gated_mlp_reference(x, *dense, activation=activation), rtol=1e-5, atol=1e-5 * scale**2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_biases_are_added_to_each_product(dtype, instruction_set):
    packed, (gate, up, down) = layer("BF16")
    biases = [jnp.linspace(-1, 1, size).astype(dtype) for size in (F, F, D)]
    x = inputs(9, dtype)
    gate_out, up_out = (quant_matmul_reference(x, weight, bias=bias, dtype=jnp.float32)
                        for weight, bias in zip((gate, up), biases[:2], strict=True))
    inner = (jax.nn.silu(gate_out) * up_out).astype(dtype)
    assert error(run_mlp(x, packed, tuple(biases), activation="silu"), quant_matmul_reference(inner, down, bias=biases[2])) < 2e-3
    only_up = run_mlp(x, packed, (None, biases[1], None), activation="silu")
    inner = (jax.nn.silu(quant_matmul_reference(x, gate, dtype=jnp.float32)) * up_out).astype(dtype)
    assert error(only_up, quant_matmul_reference(inner, down)) < 2e-3


def test_the_weights_of_a_layer_may_have_different_formats(instruction_set):
    made = [make_weight(case) for case in (Case(Format.I4, 512, D, group=32, zero=8, scale_dtype="float16"), Case(Format.BF16, 512, D),
                                           k_quant(Format.Q6, num_outputs=D))]
    x = inputs(20, "bfloat16")
    out = run_mlp(x, tuple(packed for packed, _ in made), (None,) * 3, activation="silu")
    assert error(out, gated_mlp_reference(x, *(jnp.asarray(canonical.dense()) for _, canonical in made), activation="silu")) < 2e-3


@pytest.mark.parametrize("value", [1e4, 1e-40, 0.0, 1e18])
def test_extreme_activations_give_no_nan_in_an_mlp(value, instruction_set):
    packed, _ = layer("I8")
    out = run_mlp(jnp.full((2, D), value, jnp.float32), packed, (None,) * 3, activation="gelu_tanh")
    assert not np.isnan(np.asarray(out)).any()


def test_an_mlp_of_no_rows_is_empty(native_library):
    assert run_mlp(inputs(0), layer("I8")[0], (None,) * 3, activation="silu").shape == (0, D)


def test_weights_that_are_no_mlp_are_refused(native_library):
    gate, up, down = layer("I8")[0]
    for x, weights in ((inputs(2), (gate, up, gate)), (inputs(2), (gate, down, down)), (inputs(2, d=F), (gate, up, down))):
        with pytest.raises(ValueError, match=r"gated MLP|cannot multiply"):
            run_mlp(x, weights, (None,) * 3, activation="silu")
    with pytest.raises(TypeError, match="int32"):
        run_mlp(inputs(2).astype(jnp.int32), (gate, up, down), (None,) * 3, activation="silu")
    with pytest.raises(ValueError, match="bias"):
        run_mlp(inputs(2), (gate, up, down), (jnp.zeros(3), None, None), activation="silu")


@pytest.mark.parametrize("shape", [(1, 5), (7, 64), (2, 3, 100), (40, 2048), (0, 16)])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")])
def test_the_norm_is_its_reference_with_and_without_a_delta(shape, dtype, weight_dtype, instruction_set):
    rng = np.random.default_rng(0)
    x, delta = (jnp.asarray(3 * rng.standard_normal(shape, np.float32), dtype) for _ in range(2))
    weight = jnp.asarray(rng.uniform(0.5, 1.5, shape[-1]).astype(np.float32), weight_dtype)
    rounding = float(jnp.finfo(dtype).eps)
    normed, = run_norm(x, weight, None, eps=1e-5)
    np.testing.assert_allclose(*(np.asarray(y).astype(np.float32) for y in (normed, rms_norm_reference(x, weight, eps=1e-5))),
                               rtol=max(1e-5, rounding), atol=1e-6)
    normed, total = run_norm(x, weight, delta, eps=1e-5)
    assert np.asarray(total).tobytes() == np.asarray(x + delta).tobytes()
    np.testing.assert_allclose(*(np.asarray(y).astype(np.float32) for y in (normed, rms_norm_reference(total, weight, eps=1e-5))),
                               rtol=max(1e-5, rounding), atol=1e-6)


@pytest.mark.parametrize("num_columns", [1, 31, 1000, 40000])
def test_norms_and_sums_of_a_row_are_the_same_bits_in_any_batch(num_columns, instruction_set):
    x = inputs(9, d=num_columns)
    normed, sums = np.asarray(run_norm(x, jnp.ones(num_columns), None, eps=1e-6)[0]), np.asarray(attention.row_sums(x))
    assert sums.dtype == np.float32
    np.testing.assert_allclose(sums, np.asarray(x, np.float64).sum(-1), atol=1e-3)
    for rows in (slice(0, 1), slice(8, 9), slice(2, 7)):
        assert np.asarray(run_norm(x[rows], jnp.ones(num_columns), None, eps=1e-6)[0]).tobytes() == normed[rows].tobytes()
        assert np.asarray(attention.row_sums(x[rows])).tobytes() == sums[rows].tobytes()


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e4, 1e18])
def test_the_norm_of_extreme_rows_is_finite(value, instruction_set):
    assert np.isfinite(np.asarray(run_norm(jnp.full((2, 40), value), jnp.ones(40), None, eps=1e-6)[0])).all()


def test_the_gradient_of_the_norm_is_that_of_the_reference(native_library):
    x, delta, weight = inputs(3), inputs(3)[::-1], jnp.linspace(0.5, 1.5, D)

    def of_native(x, delta, weight):
        return (ops.add_rms_norm(x, delta, weight, eps=1e-5, partition=ONE_DEVICE)[0] ** 2).sum()

    def of_reference(x, delta, weight):
        return (rms_norm_reference(x + delta, weight, eps=1e-5) ** 2).sum()
    for got, wanted in zip(*(jax.grad(f, argnums=(0, 1, 2))(x, delta, weight) for f in (of_native, of_reference)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_norms_of_what_does_not_fit_are_refused(native_library):
    x = inputs(2)
    for weight, delta in ((jnp.ones(3), None), (jnp.ones(D), x[:1]), (jnp.ones(D), x.astype(jnp.bfloat16))):
        with pytest.raises(ValueError, match="norm"):
            run_norm(x, weight, delta, eps=1e-5)
    with pytest.raises(TypeError, match="int8"):
        run_norm(x.astype(jnp.int8), jnp.ones(D), None, eps=1e-5)
