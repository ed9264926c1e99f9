"""Packing: the layout that csrc/kernels.h describes, weights quantized while they are loaded, and the layouts there are kernels for."""
import concurrent.futures

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding_rules import TENSOR, Partition, ShardingError, make_mesh
from tests.native.cases import CASES, DENSE_DTYPES, NUM_CODES, Case, make_weight
from tpllm.checkpoint.matrices import make_matrix
from tpllm.errors import ConfigError
from tpllm.native import packed
from tpllm.native.packed import UNIT_BYTES, Format, PackedLayout, pack_rows
from tpllm.quant.quantized_tensor import QuantizedTensor, quantize_shard
from tpllm.quant.schemes import SCHEMES, find_scheme, quantize
from tpllm.quant.storage import Storage

pytestmark = pytest.mark.usefixtures("native_library")

SIZES = [(1, 1), (32, 32), (33, 31), (70, 100)]


def random_rows(code_format, shape, seed=0):
    rng = np.random.default_rng(seed)
    if code_format in DENSE_DTYPES:
        return rng.standard_normal(shape).astype(DENSE_DTYPES[code_format])
    return rng.integers(0, NUM_CODES.get(code_format, 256), shape).astype(np.uint8)


def pack(code_format, rows):
    out = np.full(PackedLayout(code_format, rows.shape, group=min(packed.GROUPS.get(code_format, (0,)))).array_shapes()["codes"], 0xAA, np.uint8)
    pack_rows(code_format, rows, out)
    return out


def unpacked(code_format, blocks):
    """[blocks, 32 n, units, 32 k] of what is packed, read as csrc/kernels.h has it."""
    num_blocks, num_units, _ = blocks.shape
    if code_format in (Format.F32, Format.F16):
        return blocks.view(DENSE_DTYPES[code_format]).reshape(num_blocks, num_units, 32, 32).transpose(0, 3, 1, 2)
    if code_format == Format.BF16:
        return blocks.view(DENSE_DTYPES[code_format]).reshape(num_blocks, num_units, 16, 32, 2).transpose(0, 3, 1, 2, 4).reshape(
            num_blocks, 32, num_units, 32)
    if UNIT_BYTES[code_format] == 1024:
        quads = blocks.reshape(num_blocks, num_units, 8, 32, 4)[..., [0, 2, 1, 3]]
        return quads.transpose(0, 3, 1, 2, 4).reshape(num_blocks, 32, num_units, 32)
    words = blocks.view(np.uint32).reshape(num_blocks, num_units, -1, 32).transpose(0, 3, 1, 2)  # [blocks, n, units, words]
    k = np.arange(32)
    half = k % 2 * 16
    codes = words[..., k // 8] >> (4 * (k // 2 % 4) + half) & 0xF
    if code_format == Format.Q5:
        codes |= (words[..., 4 + 0 * k] >> (k // 2 + half) & 1) << 4
    if code_format == Format.Q6:
        codes |= (words[..., 4 + k // 16] >> (2 * (k % 16 // 2) + half) & 3) << 4
    return codes


@pytest.mark.parametrize("code_format", Format)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_packed_codes_lie_as_the_layout_says_and_padding_is_zeros(code_format, shape):
    rows = random_rows(code_format, shape)
    codes = unpacked(code_format, pack(code_format, rows))
    codes = codes.reshape(codes.shape[0] * 32, -1)
    np.testing.assert_array_equal(codes[:shape[0], :shape[1]], rows)
    assert not codes[shape[0]:].astype(np.float32).any()
    assert not codes[:, shape[1]:].astype(np.float32).any()


@pytest.mark.parametrize("code_format", [Format.BF16, Format.I4])
def test_rows_packed_some_at_a_time_or_cut_out_of_a_larger_matrix_give_the_same(code_format):
    matrix = random_rows(code_format, (100, 90))
    rows = matrix[:, 20:70]
    whole, parts = pack(code_format, np.ascontiguousarray(rows)), np.empty((4, 2, UNIT_BYTES[code_format]), np.uint8)
    for first, last in ((96, 100), (0, 64), (64, 96)):
        pack_rows(code_format, rows[first:last], parts, first_row=first)
    pack_rows(code_format, rows[:0], parts)
    np.testing.assert_array_equal(parts, whole)


@pytest.mark.parametrize(("rows", "out_shape", "first_row"), [
    (np.zeros((32, 32), np.float64), (1, 1, 4096), 0),
    (np.zeros((32, 32), np.float32), (1, 2, 4096), 0),
    (np.zeros((32, 32), np.float32), (1, 1, 4095), 0),
    (np.zeros((33, 32), np.float32), (1, 1, 4096), 0),
    (np.zeros((32, 32), np.float32), (1, 1, 4096), 32),
    (np.zeros((32, 32), np.float32), (2, 1, 4096), 7),
    (np.zeros((32, 64), np.float32)[:, ::2], (1, 1, 4096), 0),
])
def test_rows_that_do_not_fit_are_refused(rows, out_shape, first_row):
    with pytest.raises(ValueError, match="pack"):
        pack_rows(Format.F32, rows, np.empty(out_shape, np.uint8), first_row=first_row)


@pytest.mark.parametrize(("code_format", "changes", "message"), [
    (Format.I8, {"group": 16}, "groups"), (Format.I4, {"group": 96}, "groups"), (Format.Q5, {"group": 0}, "groups"), (Format.Q6, {}, "groups"),
    (Format.F32, {"group": 32}, "groups"), (Format.I4, {"group": 32, "super_group": 96}, "power of two"),
    (Format.I4, {"group": 64, "super_group": 32}, "power of two"), (Format.I8, {"super_group": 256}, "power of two"),
    (Format.I4, {"quantizes_input": True}, "int8"), (Format.I8, {"group": 32, "quantizes_input": True}, "int8"),
])
def test_a_layout_without_a_kernel_is_refused(code_format, changes, message):
    with pytest.raises(ValueError, match=message):
        PackedLayout(code_format, (64, 768), **changes)


@pytest.mark.parametrize("case", [Case(Format.I4, has_mins=True, scale_dtype="float32"),
                                  Case(Format.Q6, group=16, has_mins=True, scale_dtype="float32")], ids=str)
def test_mins_that_no_kernel_reads_are_refused(case):
    with pytest.raises(ValueError, match="mins"):
        make_weight(case)[0].attributes()


def test_the_bytes_of_a_weight_are_those_of_its_arrays():
    for case in CASES:
        if case.scale_dtype is not None and not case.has_mins and not case.super_group:
            weight, _ = make_weight(case)
            assert packed.packed_bytes(weight.layout, weight.scales.dtype.itemsize) == weight.codes.nbytes + weight.scales.nbytes


@pytest.mark.parametrize("name", SCHEMES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), num_rows=st.integers(0, 5), num_inputs=st.integers(1, 100), magnitude=st.floats(1e-3, 1e4))
def test_quantizing_is_off_by_half_a_step_at_most_or_a_step_at_the_ends(name, seed, num_rows, num_inputs, magnitude):
    scheme = SCHEMES[name]
    rows = magnitude * np.random.default_rng(seed).standard_normal((num_rows, num_inputs), np.float32)
    codes, scales = quantize(rows, scheme)
    assert codes.shape == rows.shape
    assert scales.shape == (num_rows, scheme.num_groups(num_inputs))
    assert scales.dtype == scheme.scale_dtype
    steps = np.repeat(scales.astype(np.float32), scheme.group or num_inputs, axis=1)[:, :num_inputs]
    off, is_end = np.abs(codes * steps - rows), codes == 2 ** (scheme.bits - 1) - 1
    assert (off <= np.abs(steps) * np.where(is_end, 1.01, 0.505)).all()
    assert (np.abs(codes.astype(np.int32)) <= (127 if scheme.bits == 8 else 8)).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_times_scales_quantize_to_themselves_and_zeros_to_zeros(name):
    scheme = SCHEMES[name]
    rng = np.random.default_rng(0)
    codes = rng.integers(-7, 8, (6, 96)).astype(np.int8) if scheme.bits == 4 else rng.integers(-127, 128, (6, 96)).astype(np.int8)
    codes[:, ::32] = -8 if scheme.bits == 4 else 127
    codes[4] = 0
    rows = (codes * np.float32(0.25)).astype(np.float32)
    found, scales = quantize(rows, scheme)
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(scales[[0, 1, 2, 3, 5]], np.float32(0.25))
    assert not scales[4].any()


@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_shards_of_a_matrix_are_quantized_as_the_whole(name, num_shards):
    rows = np.random.default_rng(0).standard_normal((5, 256), np.float32)
    codes, scales = quantize(rows, SCHEMES[name])
    parts = [quantize_shard(rows, SCHEMES[name], shard, num_shards) for shard in range(num_shards)]
    np.testing.assert_array_equal(np.concatenate([part[0] for part in parts], axis=1), codes)
    np.testing.assert_array_equal(np.concatenate([part[1] for part in parts], axis=1) if SCHEMES[name].group else parts[0][1], scales)


@pytest.mark.parametrize("name", [None, *SCHEMES])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(70, 100), (32, 64), (1, 33)], ids=str)
def test_a_matrix_made_at_load_is_what_quantizing_gives_packed_or_not(name, dtype, shape):
    scheme = find_scheme(name)
    rows = np.random.default_rng(0).standard_normal(shape, np.float32)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        made = {is_packed: make_matrix(layout, lambda first, last: rows[first:last].astype(layout.source_dtype), pool)
                for is_packed in (True, False)
                if (layout := Storage(np.dtype(jnp.dtype(dtype)), scheme, is_packed).layout(shape, (None, None), None, name="w")) is not None}
    if scheme is None:
        assert list(made) == [True]
        codes = unpacked(made[True].layout.format, np.asarray(made[True].codes))
        np.testing.assert_array_equal(codes.reshape(-1, codes.shape[2] * 32)[:shape[0], :shape[1]], rows.astype(dtype))
        return
    codes, scales = quantize(rows, scheme)
    assert isinstance(made[False], QuantizedTensor)
    np.testing.assert_array_equal(np.asarray(made[False].codes).astype(np.int8), codes)
    steps = np.repeat(scales.astype(np.float32), scheme.group or shape[1], axis=1)[:, :shape[1]]
    np.testing.assert_array_equal(made[False].dequantize(), codes * steps)
    found = unpacked(made[True].layout.format, np.asarray(made[True].codes)).reshape(-1, -(-shape[1] // 32) * 32)[:shape[0], :shape[1]]
    np.testing.assert_array_equal(found.astype(np.int8) - np.int8(made[True].layout.zero), codes)
    blocks = np.asarray(made[True].scales).reshape(-1, scales.shape[1], 32)
    np.testing.assert_array_equal(blocks.transpose(0, 2, 1).reshape(-1, scales.shape[1])[:shape[0]], scales)


def test_rows_of_a_quantized_table_are_those_of_the_dense_one():
    rows = np.random.default_rng(0).standard_normal((9, 70), np.float32)
    layout = Storage(np.dtype(np.float32), find_scheme("int4")).layout(rows.shape, (None, None), None, name="table")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        table = make_matrix(layout, lambda first, last: rows[first:last], pool)
    np.testing.assert_array_equal(table.rows(jnp.array([[3, 0], [8, 99]]), jnp.float32), table.dequantize()[np.array([[3, 0], [8, 8]])])


def test_what_cannot_be_quantized_or_cut_is_refused_with_its_name():
    with pytest.raises(ConfigError, match=r"'int3'.*int8, int4"):
        find_scheme("int3")
    partition = Partition(make_mesh({"tp": 4}), TENSOR)
    with pytest.raises(ShardingError, match=r"w: a shard of 160 inputs in 4 parts is no multiple of the group of 32"):
        Storage(np.dtype(np.float32), find_scheme("int4")).layout((64, 160), (None, "mlp"), partition, name="w")
    for is_packed in (False, True):
        with pytest.raises(ShardingError, match="w"):
            Storage(np.dtype(np.float32), find_scheme("int8"), is_packed).layout((66, 64), ("mlp", None), partition, name="w")
    assert Storage(np.dtype(np.float32), find_scheme("int8"), True).layout((64,), (None,), None, name="norm") is None
