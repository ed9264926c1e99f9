"""Products of packed weights against the references, on every instruction set."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.quant_matmul import int8_matmul_reference, quant_matmul_reference
from tests.native.cases import CASES, INT8_INPUTS, Case, k_quant, make_input, make_weight
from tpllm.native import library
from tpllm.weights import native_products as products
from tpllm.weights.native import Format

ROWS = (1, 2, 7, 8, 64)
weight_of = functools.cache(make_weight)


@functools.partial(jax.jit, static_argnames="dtype")
def multiply(x, weights, biases, dtype=None):
    return products.linear(x, weights, biases, dtype)


def linear(x, weight, bias=None, dtype=None):
    return np.asarray(multiply(x, (weight,), (bias,), None if dtype == x.dtype else dtype)[0])  # one program for the two


def error(out, expected):
    """Relative, in the Frobenius norm."""
    out, expected = (np.asarray(array, np.float64) for array in (out, expected))
    return np.linalg.norm(out - expected) / np.linalg.norm(expected)


@functools.cache
def expected(case, num_rows):
    _, canonical = weight_of(case)
    arrays, how = canonical.arguments()
    return np.asarray(quant_matmul_reference(make_input(case, num_rows), *arrays, **how, dtype=jnp.float32))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_product_is_the_reference_for_one_row_a_few_and_many(case, instruction_set):
    weight, _ = weight_of(case)
    for num_rows in (1, 7, 64):
        out = linear(make_input(case, num_rows), weight, dtype=jnp.float32)
        assert out.shape == (num_rows, case.num_outputs)
        assert error(out, expected(case, num_rows)) < 2e-3


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_result_in_the_inputs_dtype_is_the_float32_one_rounded_once(case, instruction_set):
    weight, _ = weight_of(case)
    x = make_input(case, 7)
    out = linear(x, weight)
    assert out.dtype == x.dtype
    assert out.tobytes() == linear(x, weight, dtype=jnp.float32).astype(out.dtype).tobytes()


@pytest.mark.parametrize("case", CASES + INT8_INPUTS, ids=str)
def test_the_number_of_rows_does_not_change_a_bit_of_any(case, instruction_set):
    weight, _ = weight_of(case)
    x = make_input(case, max(ROWS))
    together = linear(x, weight)
    for num_rows in ROWS[:-1]:
        parts = [linear(x[first:first + num_rows], weight) for first in (0, 3, max(ROWS) - num_rows)]
        for first, part in zip((0, 3, max(ROWS) - num_rows), parts, strict=True):
            assert part.tobytes() == together[first:first + num_rows].tobytes()


@pytest.mark.parametrize("case", INT8_INPUTS, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_int8_activations_give_the_bits_of_their_reference_and_stay_near_that_of_floats(case, has_bias, instruction_set):
    weight, canonical = weight_of(case)
    (codes, scales, _), _ = canonical.arguments()
    bias = jnp.linspace(-1, 1, case.num_outputs).astype(case.x_dtype) if has_bias else None
    for num_rows in (1, 9, 64):
        x = make_input(case, num_rows)
        wanted = np.asarray(int8_matmul_reference(x, codes, scales, dtype=jnp.float32))
        wanted = wanted if bias is None else wanted + np.asarray(bias, np.float32)
        assert linear(x, weight, bias, dtype=jnp.float32).tobytes() == wanted.tobytes()
        assert error(linear(x, weight, dtype=jnp.float32), expected(case, num_rows)) < 1e-2


@pytest.mark.parametrize("format_name", ["I4", "Q5", "Q6"])
@pytest.mark.parametrize("num_inputs", [256, 288])  # the last super group may be short
def test_two_level_scales_are_those_of_k_quants_spelled_out(format_name, num_inputs, instruction_set):
    case = k_quant(Format[format_name], num_outputs=33, num_inputs=num_inputs)
    weight, canonical = weight_of(case)
    arrays = {name: np.asarray(array, np.float64) for name, array in weight.arrays().items() if name != "codes"}
    dense = np.zeros((case.num_outputs, num_inputs))
    for n in range(case.num_outputs):
        for k in range(num_inputs):
            group, above = (n // 32, k // case.group, n % 32), (n // 32, k // 256, n % 32)
            dense[n, k] = arrays["super_scales"][above] * arrays["scales"][group] * (int(canonical.codes[n, k]) - case.zero)
            if case.has_mins:
                dense[n, k] -= arrays["super_mins"][above] * arrays["mins"][group]
    np.testing.assert_allclose(canonical.dense(), dense, rtol=1e-5, atol=1e-8)
    x = make_input(case, 5)
    assert error(linear(x, weight), np.asarray(x, np.float64) @ dense.T) < 1e-5


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", "float16"])
def test_several_weights_of_one_input_are_the_products_of_each(x_dtype, instruction_set):
    cases = [Case(Format.BF16, 70, 256), Case(Format.I4, 33, 256, group=64, has_mins=True, scale_dtype="float16"),
             Case(Format.I8, 1, 256, scale_dtype="float32", quantizes_input=True), Case(Format.F32, 5, 256)]
    weights = tuple(weight_of(case)[0] for case in cases)
    biases = tuple(None if i == 1 else jnp.linspace(-1, 1, case.num_outputs).astype(x_dtype) for i, case in enumerate(cases))
    for num_rows in (1, 20):
        x = make_input(dataclasses.replace(cases[0], x_dtype=x_dtype), num_rows)
        outs = multiply(x, weights, biases)
        for out, weight, bias in zip(outs, weights, biases, strict=True):
            assert np.asarray(out).tobytes() == linear(x, weight, bias).tobytes()


@pytest.mark.parametrize("case", [case for case in CASES if case.x_dtype == "float32"], ids=str)
def test_a_bias_is_added_to_the_sum(case, instruction_set):
    weight, _ = weight_of(case)
    bias = jnp.linspace(-3, 3, case.num_outputs)
    np.testing.assert_allclose(linear(make_input(case, 7), weight, bias), linear(make_input(case, 7), weight) + np.asarray(bias), rtol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES + INT8_INPUTS if case.x_dtype != "float16"], ids=str)
def test_extreme_activations_give_no_nan(case, instruction_set):
    weight, canonical = weight_of(case)
    arrays, how = canonical.arguments()
    huge = np.where(np.arange(case.num_inputs) == 5, 3e38, 1)
    rows = np.stack([np.full(case.num_inputs, 1e4), np.full(case.num_inputs, 1e-40), np.zeros(case.num_inputs), huge, -huge, huge, -huge])
    x = jnp.asarray(rows.astype(np.float32), case.x_dtype)
    out = linear(x, weight)
    assert not np.isnan(out.astype(np.float32)).any()
    assert not out[1:3].astype(np.float32).any()  # denormals count as zero
    reference = np.asarray(quant_matmul_reference(x, *arrays, **how), np.float32)
    assert error(out[0], reference[0]) < 1e-2


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_shape_is_the_reference(data, native_library):
    case = data.draw(st.sampled_from([Case(Format.F32), Case(Format.BF16), Case(Format.I8, scale_dtype="float32"),
                                      Case(Format.I8, scale_dtype="float32", quantizes_input=True),
                                      Case(Format.I4, group=32, zero=8, scale_dtype="float16"), k_quant(Format.Q6)]))
    sizes = {"num_outputs": data.draw(st.integers(1, 100)), "num_inputs": data.draw(st.integers(1, 100))}
    case, num_rows = dataclasses.replace(case, **sizes), data.draw(st.integers(0, 30))
    weight, canonical = make_weight(case)
    arrays, how = canonical.arguments()
    x = make_input(case, num_rows)
    reference = np.asarray(quant_matmul_reference(x, *arrays, **how))
    for name in library.instruction_sets():
        with library.use_instruction_set(name):
            out = linear(x, weight)
        assert out.shape == reference.shape
        np.testing.assert_allclose(out, reference, atol=0.05 if case.quantizes_input else 1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if case.x_dtype == "float32"], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lookup_is_the_rows_of_the_dense_table_and_zeros_beyond_it(case, dtype, instruction_set):
    weight, canonical = weight_of(case)
    tokens = jnp.asarray([[0, 1, 31], [32, case.num_outputs - 1, case.num_outputs], [-1, 64, 2**31 - 1]], jnp.int32)
    out = np.asarray(lookup(tokens, weight, dtype))
    assert out.shape == (3, 3, case.num_inputs)
    rows = np.concatenate([canonical.dense(), np.zeros((1, case.num_inputs), np.float32)])
    wanted = rows[np.where((tokens < 0) | (tokens >= case.num_outputs), case.num_outputs, tokens)]
    np.testing.assert_allclose(out.astype(np.float32), wanted, rtol=2**-8 if dtype == "bfloat16" else 1e-5, atol=1e-7)


@functools.partial(jax.jit, static_argnames="dtype")
def lookup(tokens, table, dtype):
    return products.lookup(tokens, table, jnp.dtype(dtype))


@pytest.mark.parametrize(("change", "error_type"), [
    (lambda x, weight: (x[:, :-1], weight, None), ValueError),
    (lambda x, weight: (x.astype(jnp.int8), weight, None), TypeError),
    (lambda x, weight: (x, weight, jnp.zeros(3)), ValueError),
    (lambda x, weight: (x, weight.replace(codes=weight.codes[:1]), None), Exception),
    (lambda x, weight: (x, weight.replace(scales=weight.scales[:1]), None), Exception),
])
def test_what_does_not_fit_is_an_error_that_python_raises(change, error_type, native_library):
    case = Case(Format.I8, 70, 64, scale_dtype="float32")
    with pytest.raises(error_type):
        linear(*change(make_input(case, 2), weight_of(case)[0]))


def test_tokens_that_are_no_int32_are_refused(native_library):
    with pytest.raises(TypeError, match="int32"):
        products.lookup(jnp.zeros(3, jnp.int8), weight_of(Case(Format.F32))[0], jnp.float32)
