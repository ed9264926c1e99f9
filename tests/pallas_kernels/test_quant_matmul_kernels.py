"""Kernels of quantized products, interpreted, against a float32 oracle that knows nothing of packing."""
import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quant_matmul import (
    WeightFormat,
    dequantize_packed,
    int8_matmul_reference,
    jax_triton,
    layout_for,
    pack,
    packed_matmul_reference,
    quant_matmul,
    quantize_rows,
)
from pallas_kernels.quant_matmul.cases import CASES, FORMATS, Case, random_arrays, random_weight, with_layout
from pallas_kernels.quant_matmul.gpu_tiles import Problem, candidates, num_parts
from pallas_kernels.tiling import Device
from tests.pallas_kernels import hidden_triton, quick_interpreter

H200, V5E, A100 = Device("gpu", "NVIDIA H200", (9, 0)), Device("tpu", "TPU v5 lite"), Device("gpu", "NVIDIA A100", (8, 0))
BACK_ENDS = {"mosaic_gpu": (H200, "fragments"), "mosaic_tpu": (V5E, "columns"), "triton": (A100, "rows")}
TOLERANCE = {"bfloat16": 1e-2, "float16": 3e-3, "float32": 1e-3}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quick_interpreter.install(monkeypatch)


dequantize = jax.jit(dequantize_packed, static_argnums=0)


def oracle_weight(name: str, weight) -> np.ndarray:
    f, K = FORMATS[name], weight["codes_NK"].shape[1]

    def spread(values, group):
        return np.repeat(np.asarray(values, np.float32), group or K, axis=1)[:, :K]
    scales = spread(weight["scales"], f.group) * (spread(weight["super_scales"], f.super_group) if f.super_group else 1)
    found = scales * (np.asarray(weight["codes_NK"], np.float32) - f.zero)
    if f.mins == "none":
        return found
    mins = spread(weight["mins"], f.group)
    return found + {"float": lambda: mins, "zeros": lambda: -scales * mins,
                    "super": lambda: -mins * spread(weight["super_mins"], f.super_group)}[f.mins]()


def error(y, expected) -> float:
    y, expected = np.asarray(y, np.float32), np.asarray(expected, np.float32)
    assert np.isfinite(y).all()
    return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))


def supports(back_end: str, case: Case) -> bool:
    f = case.weight_format
    if back_end == "triton":
        return f.bits == 4 and not f.super_group
    return back_end == "mosaic_gpu" or case.dtype == "bfloat16"


NEWEST = {"mosaic_gpu": CASES[0], "mosaic_tpu": CASES[0], "triton": next(case for case in CASES if supports("triton", case))}
PAIRS = [pytest.param(back_end, case, id=f"{back_end}-{case}",
                      marks=[pytest.mark.slow] if case.is_slow else [pytest.mark.newest] if case == NEWEST[back_end] else [])
         for back_end in BACK_ENDS for case in CASES if supports(back_end, case)]


@pytest.mark.parametrize(("back_end", "case"), PAIRS)
def test_a_kernel_multiplies_as_the_formula_says(back_end, case):
    device, layout = BACK_ENDS[back_end]
    seed = random.randrange(2**32)
    print("seed", seed)
    x, arrays, bias = random_arrays(case, layout, seed)
    f = with_layout(case.weight_format, layout)
    how = {"weight_format": f, "num_outputs": case.N, "bias": bias}
    y = jax.jit(functools.partial(quant_matmul, device=device, implementation=back_end, interpret=True, **how))(x, arrays)
    assert y.shape == (case.M, case.N)
    assert y.dtype == x.dtype
    canonical = random_weight(f, case.N, case.K, np.random.default_rng(seed))
    padded = np.pad(x, ((0, 0), (0, f.shape(arrays.codes)[1] - case.K)))
    codes, scales = jax.jit(quantize_rows, static_argnums=1)(padded, f)
    values = np.asarray(codes, np.float32) * (1 if scales is None else np.repeat(scales, f.group or padded.shape[1], axis=1))
    expected = values[:, :case.K] @ oracle_weight(case.name, canonical).T + (0 if bias is None else np.asarray(bias))
    assert error(y, expected) < TOLERANCE[case.dtype]
    reference = jax.jit(functools.partial(packed_matmul_reference, dtype=jnp.float32, **how))(x, arrays)
    assert error(reference, expected) < TOLERANCE["float32"]
    if f.activations == "int8" and bias is None:
        found = jax.jit(int8_matmul_reference)(x, canonical["codes_NK"], canonical["scales"][:, 0])
        assert np.array_equal(y, found)


@pytest.mark.parametrize("layout", ["rows", "columns", "fragments"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_weight_means_what_it_meant_before(name, layout):
    f, rng = with_layout(FORMATS[name], layout), np.random.default_rng(random.randrange(2**32))
    weight = random_weight(f, 130, 512, rng)
    for arrays in (pack(f, **weight), jax.jit(functools.partial(pack, f))(**{name: jnp.asarray(array) for name, array in weight.items()})):
        assert f.shape(arrays.codes) == (256, 512)
        np.testing.assert_allclose(dequantize(f, arrays)[:130], oracle_weight(name, weight), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["int8", "int4", "int4-g128-zeros", "q4_k", "q5_k", "q6_k", "fp8-g128"])
def test_a_packed_weight_takes_at_most_a_twentieth_more_than_its_own_bits(name):
    own_bits = {"int8": 8, "int4": 4.5, "int4-g128-zeros": 4 + 24 / 128, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625, "fp8-g128": 8 + 32 / 128}[name]
    for layout in ("rows", "columns", "fragments"):
        arrays = pack(with_layout(FORMATS[name], layout), **random_weight(FORMATS[name], 128, 4096, np.random.default_rng(0)))
        num_bytes = sum(array.nbytes for array in arrays if array is not None)
        assert num_bytes * 8 / (128 * 4096) < 1.05 * own_bits


def test_a_shard_of_inputs_is_packed_by_itself_and_the_products_add_up():
    f, rng = with_layout(FORMATS["int4"], "fragments"), np.random.default_rng(1)
    weight, x = random_weight(f, 128, 512, rng), jnp.asarray(rng.standard_normal((2, 512)), jnp.bfloat16)
    parts = []
    for first in (0, 256):
        shard = {"codes_NK": weight["codes_NK"][:, first:first + 256], "scales": weight["scales"][:, first // 32:first // 32 + 8]}
        parts.append(packed_matmul_reference(x[:, first:first + 256], pack(f, **shard), weight_format=f, dtype=jnp.float32))
    whole = packed_matmul_reference(x, pack(f, **weight), weight_format=f, dtype=jnp.float32)
    assert error(parts[0] + parts[1], whole) < 1e-5


def test_a_row_comes_out_of_a_tpus_kernel_the_same_alone_and_among_many():
    case = Case("int4", 70, 128, 1024)
    x, arrays, _ = random_arrays(case, "columns", random.randrange(2**32))
    run = jax.jit(functools.partial(quant_matmul, arrays=arrays, weight_format=with_layout(case.weight_format, "columns"), device=V5E,
                                    implementation="mosaic_tpu", interpret=True, dtype=jnp.float32))
    many = run(x)
    for rows in (1, 9):
        np.testing.assert_array_equal(run(x[:rows]), many[:rows])


@pytest.mark.parametrize("name", ["int8", "q4_k", "w8a8", "fp8-g128-a8"])
def test_a_gpus_kernel_sums_the_same_parts_of_the_inputs_however_many_rows_there_are(name):
    f, N, K = with_layout(FORMATS[name], "fragments"), 1024, 8192
    for rows in (1, 16, 33, 64, 4096):
        for tiles in candidates(rows, N, K, f):
            problem = Problem(f, rows, N, K, "bfloat16", "bfloat16", tiles, has_bias=False, interpret=False)
            parts = problem.num_parts if problem.has_partial_sums else problem.parts_in_turn
            assert parts == num_parts(N, K, f) > 1 or f.activations == "int8"
            assert K // parts % tiles.inputs == 0


def test_the_gradient_is_that_of_the_dequantized_weight():
    case = Case("int8", 4, 128, 256, has_bias=True)
    x, arrays, bias = random_arrays(case, "columns", 0)
    f = with_layout(case.weight_format, "columns")

    def loss(run, x, bias):
        return jnp.sum(run(x, arrays, weight_format=f, bias=bias, dtype=jnp.float32) ** 2)
    kernel = functools.partial(quant_matmul, device=V5E, implementation="mosaic_tpu", interpret=True)
    found, expected = (jax.jit(jax.grad(functools.partial(loss, run), argnums=(0, 1)))(x, bias) for run in (kernel, packed_matmul_reference))
    assert all(error(a, b) < 2e-2 for a, b in zip(found, expected, strict=True))


def test_none_takes_the_reference_where_there_is_no_kernel():
    case = Case("int4", 4, 128, 256)
    x, arrays, _ = random_arrays(case, "rows", 0)
    y = quant_matmul(x, arrays, weight_format=case.weight_format, device=Device("metal"))
    np.testing.assert_array_equal(y, packed_matmul_reference(x, arrays, weight_format=case.weight_format))


@pytest.mark.parametrize(("implementation", "device", "changes", "message"), [
    ("mosaic_gpu", A100, {}, "needs a Hopper GPU, not NVIDIA A100"),
    ("mosaic_gpu", H200, {}, "reads layout 'fragments', not 'rows'"),
    ("mosaic_tpu", V5E, {}, "reads layout 'columns', not 'rows'"),
    ("triton", V5E, {}, "needs an NVIDIA GPU"),
    ("triton", A100, {"group": 256}, "groups of 32, 64, 128, not 4 bits in groups of 256"),
    ("cublas", H200, {}, "no implementation 'cublas'"),
])
def test_a_named_implementation_that_cannot_do_it_says_why(implementation, device, changes, message):
    f = dataclasses.replace(FORMATS["int4"], **changes)
    arrays = pack(f, **random_weight(f, 128, 256, np.random.default_rng(0)))
    with pytest.raises(ValueError, match=message):
        quant_matmul(jnp.ones((1, 256), jnp.bfloat16), arrays, weight_format=f, device=device, implementation=implementation)


@pytest.mark.parametrize(("x", "how", "message"), [
    (np.ones((2, 512), np.float32), {}, "activations of shape"), (np.ones((0, 256), np.float32), {}, "at least one row"),
    (np.ones((1, 256), np.float32), {"num_outputs": 129}, "num_outputs is 129"),
    (np.ones((1, 256), np.float32), {"bias": np.ones(3)}, "a bias of shape"),
    (np.ones((1, 256), np.float32), {"implementation": "triton"}, "takes activations of bfloat16 or float16, not float32")])
def test_shapes_and_dtypes_that_do_not_fit_are_refused(x, how, message):
    arrays = pack(FORMATS["int4"], **random_weight(FORMATS["int4"], 128, 256, np.random.default_rng(0)))
    with pytest.raises(ValueError, match=message):
        quant_matmul(jnp.asarray(x), arrays, weight_format=FORMATS["int4"], device=A100, **how)


@pytest.mark.parametrize(("fields", "message"), [
    ({"bits": 3}, "codes of 3 bits"), ({"bits": 4, "group": 48}, "groups of 48"), ({"bits": 4, "group": 32, "super_group": 48}, "super groups of 48"),
    ({"mins": "float"}, "mins belong to groups"), ({"bits": 4, "group": 32, "activations": "int8"}, "int8 activations times int weights of 4 bits")])
def test_a_format_that_no_kernel_reads_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        WeightFormat(**fields)


def test_jax_triton_says_what_to_install_where_it_is_not():
    f = FORMATS["int4"]
    arrays = pack(f, **random_weight(f, 128, 256, np.random.default_rng(0)))
    if jax_triton.refusal() is None:
        pytest.skip("jax-triton is installed")
    with pytest.raises(ValueError, match="pip install 'jax-triton"):
        quant_matmul(jnp.ones((1, 256), jnp.bfloat16), arrays, weight_format=f, device=A100, implementation="jax_triton")


def test_where_jax_has_no_triton_a_named_one_is_refused_and_an_unnamed_one_is_the_reference(monkeypatch):
    hidden_triton.install(monkeypatch)
    case = Case("int4", 4, 128, 256)
    x, arrays, _ = random_arrays(case, "rows", 0)
    how = {"weight_format": case.weight_format, "device": A100}
    with pytest.raises(ValueError, match=r"'triton' needs Pallas' back end for Triton, which jax \d+\.\d+\S* does not have"):
        quant_matmul(x, arrays, implementation="triton", **how)
    np.testing.assert_array_equal(quant_matmul(x, arrays, **how), packed_matmul_reference(x, arrays, weight_format=case.weight_format))


def test_each_device_has_its_layout():
    assert [layout_for(device) for device in (H200, V5E, A100, Device("cpu"))] == ["fragments", "columns", "rows", "rows"]
