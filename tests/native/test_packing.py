"""Packing: the layout that csrc/kernels.h describes, and the layouts there are kernels for."""
import numpy as np
import pytest

from tests.native.cases import DENSE_DTYPES, NUM_CODES, Case, make_weight
from tpllm.weights.native import GROUPS, UNIT_BYTES, Format, pack_rows

pytestmark = pytest.mark.usefixtures("native_library")

SIZES = [(1, 1), (32, 32), (33, 31), (70, 100)]


def random_rows(code_format, shape, seed=0):
    rng = np.random.default_rng(seed)
    if code_format in DENSE_DTYPES:
        return rng.standard_normal(shape).astype(DENSE_DTYPES[code_format])
    return rng.integers(0, NUM_CODES.get(code_format, 256), shape).astype(np.uint8)


def pack(code_format, rows):
    layout = Case(code_format, *rows.shape, group=min(GROUPS.get(code_format, (0,)))).layout
    out = np.full(layout.array_shapes()["codes"], 0xAA, np.uint8)
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
    if code_format in (Format.Q2, Format.Q3):
        codes = words[..., k // 16] >> (2 * (k % 16 // 2) + half) & 3
        return codes if code_format == Format.Q2 else codes | (words[..., 2 + 0 * k] >> (k // 2 + half) & 1) << 2
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
    (Format.I4, {"group": 32, "super_group": 96}, "power of two"),
    (Format.I4, {"group": 64, "super_group": 32}, "power of two"), (Format.I8, {"super_group": 256}, "power of two"),
    (Format.I4, {"quantizes_input": True}, "int8"), (Format.I8, {"group": 32, "quantizes_input": True}, "int8"),
])
def test_a_layout_without_a_kernel_is_refused(code_format, changes, message):
    with pytest.raises(ValueError, match=message):
        _ = Case(code_format, 64, 768, **changes).layout


@pytest.mark.parametrize("case", [Case(Format.I4, has_mins=True, scale_dtype="float32"),
                                  Case(Format.Q6, group=16, has_mins=True, scale_dtype="float32")], ids=str)
def test_mins_that_no_kernel_reads_are_refused(case):
    with pytest.raises(ValueError, match="mins"):
        make_weight(case)[0].attributes()
