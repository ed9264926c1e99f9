"""Schemes: what quantizing gives, how matrices made at load hold it, and what policies choose."""
import concurrent.futures
import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding_rules import ONE_DEVICE, TENSOR, Partition, ShardingError, make_mesh
from tpllm.checkpoint.placement import make_matrix
from tpllm.errors import ConfigError
from tpllm.weights.linear import linear, lookup
from tpllm.weights.native import NativeWeight
from tpllm.weights.policy import parse_policy
from tpllm.weights.quantize import MXFP4, SCHEMES, quantize
from tpllm.weights.regroup import fit_groups, regroup, shard_of
from tpllm.weights.scheme import QuantizedRows, Scheme, dequantize, join_rows
from tpllm.weights.storage import NATIVE, Storage
from tpllm.weights.xla import XlaWeight

HALF = np.dtype(np.float16)
KEPT = {
    "2 bits": Scheme("2 bits", 2, 32, zero=2, scale_dtype=HALF), "2 bits, zeros": Scheme("2 bits, zeros", 2, 64, mins="zeros", scale_dtype=HALF),
    "3 bits": Scheme("3 bits", 3, 128, zero=4), "3 bits, zeros": Scheme("3 bits, zeros", 3, 128, mins="zeros", scale_dtype=HALF),
    "q4_0": Scheme("q4_0", 4, 32, zero=8, scale_dtype=HALF), "q4_1": Scheme("q4_1", 4, 32, mins="float", scale_dtype=HALF),
    "4 bits, zeros": Scheme("4 bits, zeros", 4, 128, mins="zeros", scale_dtype=HALF), "4 bits, one zero": Scheme("4 bits, one zero", 4, mins="zeros"),
    "4 bits, wide": Scheme("4 bits, wide", 4, 512, zero=8), "q5_1": Scheme("q5_1", 5, 32, mins="float", scale_dtype=HALF),
    "5 bits": Scheme("5 bits", 5, zero=16), "q4_k": dataclasses.replace(SCHEMES["q4_k"], name="stored q4_k"),
    "q6_k": Scheme("q6_k", 6, 16, zero=32, super_group=256, scale_dtype=np.dtype(np.int8)),
    "7 bits": Scheme("7 bits", 7, 64, zero=64),
    "7 bits, zeros": Scheme("7 bits, zeros", 7, 32, mins="zeros"), "8 bits": Scheme("8 bits", 8),
    "8 bits, mins": Scheme("8 bits, mins", 8, 64, mins="float"), "fp8 blocks": Scheme("fp8 blocks", 8, 128, kind="e4m3"),
    "e5m2": Scheme("e5m2", 8, kind="e5m2", scale_dtype=np.dtype(ml_dtypes.bfloat16)), "mxfp4": MXFP4,
    "e2m1, 16": Scheme("e2m1, 16", 4, 16, kind="e2m1", scale_dtype=HALF),
}
WEIGHT_ONLY = [name for name in SCHEMES if not SCHEMES[name].quantizes_input]


def random_rows(scheme, num_rows, num_inputs, seed=0):
    """Rows of a scheme as a checkpoint may hold them, every code among them."""
    rng = np.random.default_rng(seed)
    shape, groups = (num_rows, num_inputs), (num_rows, scheme.num_groups(num_inputs))
    if scheme.kind in ("e4m3", "e5m2"):
        codes = rng.standard_normal(shape, np.float32).astype(scheme.code_dtype)
    else:
        low, high = (-128, 128) if scheme.bits == 8 else (0, 2**scheme.bits)
        codes = rng.integers(low, high, shape).astype(scheme.code_dtype)
    supers = (num_rows, -(-num_inputs // scheme.super_group)) if scheme.super_group else None
    small = (115, 130) if scheme.has_power_scales else {"int8": (-128, 128), "uint8": (0, 64)}.get(str(scheme.scale_dtype))
    scales = (rng.integers(*small, groups) if small else rng.uniform(0.5, 1.5, groups) / 2**scheme.bits).astype(scheme.scale_dtype)
    mins = {"none": None, "float": rng.uniform(-1, 1, groups), "zeros": rng.integers(0, 2**scheme.bits, groups), "super": rng.integers(0, 64, groups)}
    mins = None if mins[scheme.mins] is None else mins[scheme.mins].astype(scheme.min_dtype)
    levels = [None if supers is None else rng.uniform(0.5, 1.5, supers).astype(np.float16) / 1024 for _ in range(2)]
    return QuantizedRows(codes, scales, mins, levels[0], levels[1] if scheme.mins == "super" else None)


def made_of(layout, rows):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return make_matrix(layout, lambda first, last: rows.take(slice(first, last)) if isinstance(rows, QuantizedRows)
                           else rows[first:last].astype(layout.source_dtype), pool)


def layout_of(scheme, shape, *, is_packed, partition=ONE_DEVICE, axes=(None, None)):
    return Storage(np.dtype(np.float32), device=NATIVE if is_packed else None, stored={"w": scheme}).layout(shape, axes, partition, name="w")


@jax.jit
def computed(x, tokens, weight):
    """(product, rows, dense weight or None), in one program."""
    return linear(x, weight), lookup(tokens, weight, jnp.float32), weight.dequantize() if isinstance(weight, XlaWeight) else None


def assert_dense(found, expected, scheme):
    """To the last bit, but for mins: within one program XLA may round a product and its sum once."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7 * np.abs(expected).max() if scheme.mins == "float" else 0)


@pytest.mark.parametrize("name", SCHEMES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), num_rows=st.integers(0, 5), num_inputs=st.integers(1, 300), magnitude=st.floats(1e-2, 1e3))
def test_no_entry_is_off_by_more_than_its_scheme_allows(name, seed, num_rows, num_inputs, magnitude):
    scheme = SCHEMES[name]
    rows = magnitude * np.random.default_rng(seed).standard_normal((num_rows, num_inputs), np.float32)
    found = quantize(rows, scheme)
    assert found.codes.shape == rows.shape
    assert found.codes.dtype == scheme.code_dtype
    assert found.scales.shape == (num_rows, scheme.num_groups(num_inputs))
    off = np.abs(dequantize(found, scheme) - rows)
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0)
    # A group is cut in 7.4 to 8.6 steps for codes of -8 to 7, or in 14 to 16 for 0 to 15: an end may be off by more than one.
    share = {"int8": 0.51 / 127, "w8a8": 0.51 / 127, "llm.int8": 0.51 / 127, "fp8": 1 / 16, "fp8-e5m2": 1 / 8, "q4_k": 0.16}.get(name, 1.7 / 8)
    assert (off <= share * largest).all()


@pytest.mark.parametrize("name", ["int8", "int4", "int4-g64"])
def test_codes_times_scales_quantize_to_themselves_and_zeros_to_zeros(name):
    scheme = SCHEMES[name]
    rng = np.random.default_rng(0)
    codes = rng.integers(-7, 8, (6, 96)).astype(np.int8) if scheme.bits == 4 else rng.integers(-127, 128, (6, 96)).astype(np.int8)
    codes[:, ::32] = -8 if scheme.bits == 4 else 127
    codes[4] = 0
    found = quantize((codes * np.float32(0.25)).astype(np.float32), scheme)
    np.testing.assert_array_equal(found.codes.astype(np.int8) - scheme.zero, codes)
    np.testing.assert_array_equal(found.scales[[0, 1, 2, 3, 5]], np.float32(0.25))
    assert not found.scales[4].any()


def test_more_bits_are_closer_and_smaller_groups_too():
    rows = np.random.default_rng(0).standard_normal((64, 1024), np.float32)
    error = {name: np.linalg.norm(dequantize(quantize(rows, SCHEMES[name]), SCHEMES[name]) - rows) / np.linalg.norm(rows) for name in SCHEMES}
    assert error["int8"] < error["fp8"] < error["fp8-e5m2"] < error["q4_k"] < error["int4"] < error["int4-g64"] < error["int4-g128"] < 0.15


@pytest.mark.parametrize("is_packed", [False, True], ids=["canonical", "packed"])
@pytest.mark.parametrize("shape", [(70, 256), (33, 512), (1, 40)], ids=str)
@pytest.mark.parametrize("scheme", KEPT.values(), ids=KEPT)
def test_what_a_checkpoint_holds_is_kept_and_multiplies_as_its_dequantized_weight(native_library, scheme, shape, is_packed):
    rows = random_rows(scheme, *shape)
    weight = made_of(layout_of(scheme, shape, is_packed=is_packed), rows)
    assert isinstance(weight, NativeWeight if is_packed else XlaWeight)
    dense = dequantize(rows, scheme)
    x = np.random.default_rng(1).standard_normal((3, shape[1]), np.float32)
    product, found, whole = computed(x, np.array([0, shape[0] - 1], np.int32), weight)
    if not is_packed:
        assert_dense(whole, dense, scheme)
    np.testing.assert_allclose(product, x @ dense.T, rtol=2e-5, atol=2e-5 * np.abs(dense).max() * shape[1] ** 0.5)
    np.testing.assert_allclose(found, dense[[0, -1]], rtol=1e-6, atol=1e-6 * np.abs(dense).max())


@pytest.mark.parametrize("is_packed", [False, True], ids=["canonical", "packed"])
@pytest.mark.parametrize("num_shards", [2, 4])
@pytest.mark.parametrize("scheme", KEPT.values(), ids=KEPT)
def test_shards_keep_the_scales_of_groups_that_they_cut(native_library, scheme, num_shards, is_packed):
    shape, partition = (64, 192 * num_shards), Partition(make_mesh({"tp": num_shards}), TENSOR)  # 192: 1.5 groups of 128, 3/4 of 256
    rows = random_rows(scheme, *shape)
    weight = made_of(layout_of(scheme, shape, is_packed=is_packed, partition=partition, axes=(None, "mlp")), rows)
    dense = dequantize(rows, scheme)
    x = np.random.default_rng(1).standard_normal((2, 3, shape[1]), np.float32)
    product, _, whole = computed(x, np.zeros((1, 1), np.int32), weight)
    if not is_packed:
        assert_dense(whole, dense, scheme)
    np.testing.assert_allclose(product, x @ dense.T, rtol=2e-5, atol=2e-5 * np.abs(dense).max() * shape[1] ** 0.5)


@pytest.mark.parametrize("scheme", [*KEPT.values(), *SCHEMES.values()], ids=[*KEPT, *SCHEMES])
def test_smaller_groups_and_shards_are_the_same_values(scheme):
    rows = random_rows(scheme, 5, 768)
    kept = fit_groups(scheme, 768, 4, allowed=None, name="w")
    small = regroup(rows, scheme, kept)
    np.testing.assert_array_equal(dequantize(small, kept), dequantize(rows, scheme))
    parts = [dequantize(shard_of(small, kept, shard, 4), kept) for shard in range(4)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), dequantize(rows, scheme))


@pytest.mark.parametrize("scheme", KEPT.values(), ids=KEPT)
def test_rows_of_parts_and_padding(scheme):
    rows = random_rows(scheme, 7, 256)
    joined = join_rows([(0, rows.take(slice(4, 6))), (2, rows.take(slice(0, 1)))], 5, scheme, 256)
    np.testing.assert_array_equal(dequantize(joined, scheme)[:3], dequantize(rows, scheme)[[4, 5, 0]])
    assert not dequantize(joined, scheme)[3:].any()


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8 + 32 / 2048), ("int4", 4.5), ("int4-g128", 4.125), ("q4_k", 4.625), ("fp8", 8 + 32 / 2048)])
def test_bits_per_weight(scheme, bits):
    assert SCHEMES[scheme].bits_per_weight(2048) == pytest.approx(bits)


def test_int8_activations_have_one_scale_a_row(native_library):
    rows = np.random.default_rng(0).standard_normal((48, 256), np.float32)
    x = np.random.default_rng(1).standard_normal((5, 256), np.float32)
    codes = quantize(rows, SCHEMES["w8a8"])
    steps = np.abs(x).max(axis=1, keepdims=True) / 127
    expected = (np.rint(x / steps) @ codes.codes.astype(np.float64).T) * steps * codes.scales[:, 0]
    for is_packed in (False, True):
        storage = Storage(np.dtype(np.float32), parse_policy("w8a8"), NATIVE if is_packed else None)
        layout = storage.layout(rows.shape, (None, None), ONE_DEVICE, name="w")
        np.testing.assert_allclose(linear(jnp.asarray(x), made_of(layout, rows)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("is_packed", [False, True])
def test_outliers_of_each_row_are_multiplied_as_they_are(is_packed):
    rng = np.random.default_rng(5)
    x, rows = rng.standard_normal((6, 96), np.float32), rng.standard_normal((40, 96), np.float32)
    outliers = np.argsort(rng.random(x.shape), axis=1)[:, :16]
    np.put_along_axis(x, outliers, 1000 * np.sign(np.take_along_axis(x, outliers, 1)) + np.take_along_axis(x, outliers, 1), axis=1)
    storage = Storage(np.dtype(np.float32), parse_policy("llm.int8"), NATIVE if is_packed else None)
    layout = storage.layout(rows.shape, (None, None), ONE_DEVICE, name="w")
    weight, bias = made_of(layout, rows), rng.standard_normal(40).astype(np.float32)
    found = np.asarray(linear(jnp.asarray(x), weight, jnp.asarray(bias)))
    codes, small = quantize(rows, SCHEMES["llm.int8"]), x.copy()
    np.put_along_axis(small, outliers, 0, axis=1)
    dense, steps = dequantize(codes, SCHEMES["int8"]).astype(np.float64), np.abs(small).max(axis=1, keepdims=True) / 127
    expected = (np.rint(small / steps) * steps + (x - small)) @ dense.T + bias
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-2)
    exact = x.astype(np.float64) @ dense.T + bias
    plain = np.asarray(linear(jnp.asarray(x), weight.without_outliers(quantizes_input=True), jnp.asarray(bias)))
    assert np.abs(found - exact).max() < 0.01 * np.abs(plain - exact).max()  # with one scale for all, the rest of a row is lost
    for row in range(6):
        assert np.asarray(linear(jnp.asarray(x[row:row + 1]), weight, jnp.asarray(bias))).tobytes() == found[row:row + 1].tobytes() or not is_packed


def test_a_policy_gives_each_parameter_the_first_rule_that_matches():
    policy = parse_policy({"*.mlp.*": "int4", "*.attn.*": "none", "*": "w8a8"})
    assert policy == parse_policy("*.mlp.*=int4, *.attn.*=none,*=w8a8")
    assert policy.choose("layers.1.mlp.up") == SCHEMES["int4"]
    assert policy.choose("layers.1.attn.q", SCHEMES["int8"]) is None
    assert policy.choose("head") == SCHEMES["int8"]  # tables are looked up, and heads decide: their activations stay
    assert parse_policy({"*.mlp.*": "int4"}).choose("layers.0.attn.q", KEPT["q6_k"]) == KEPT["q6_k"]
    assert parse_policy(None).choose("embed") is None


def test_a_lone_name_of_few_bits_leaves_the_tables_eight():
    for name in ("int4", "int4-g128", "q4_k"):
        assert [parse_policy(name).choose(table) for table in ("embed", "head")] == [SCHEMES["int8"]] * 2
        assert parse_policy(name).choose("layers.0.mlp.up") == SCHEMES[name]
        assert parse_policy(f"*={name}").choose("embed") == SCHEMES[name]
        assert parse_policy({"*": name}).choose("head") == SCHEMES[name]
    assert parse_policy("fp8").choose("embed") == SCHEMES["fp8"]
    assert parse_policy("none").choose("embed", SCHEMES["int4"]) is None


@pytest.mark.parametrize("value", ["int3", "*=int3", {"*": 8}, {1: "int8"}, 4, ["int8"], "*.mlp.*=", ""], ids=str)
def test_what_is_no_quantization_is_refused(value):
    with pytest.raises(ConfigError, match="quantization"):
        parse_policy(value)


def test_what_cannot_be_cut_is_refused_with_its_name():
    partition = Partition(make_mesh({"tp": 4}), TENSOR)
    with pytest.raises(ShardingError, match=r"w: 160 inputs in groups of 32 cannot be cut into 4 shards of 40"):
        Storage(np.dtype(np.float32), parse_policy("int4"), device=NATIVE).layout((64, 160), (None, "mlp"), partition, name="w")
    for is_packed in (False, True):
        with pytest.raises(ShardingError, match="w"):
            Storage(np.dtype(np.float32), parse_policy("int8"), NATIVE if is_packed else None).layout((66, 64), ("mlp", None), partition, name="w")
    assert Storage(np.dtype(np.float32), parse_policy("int8"), NATIVE).layout((64,), (None,), ONE_DEVICE, name="norm") is None
