"""Conversions between dtypes, against ml_dtypes' and numpy's own casts over every bit pattern there is."""
import ml_dtypes
import numpy as np
import pytest

from tpllm.checkpoint.convert import STORED, TARGETS, converter

HALVES = ("F16", "BF16")


def every_pattern(stored: str) -> np.ndarray:
    dtype = STORED[stored]
    if dtype.itemsize <= 2:
        return np.arange(256**dtype.itemsize, dtype=f"u{dtype.itemsize}").view(dtype).reshape(16, -1)
    special = [0.0, -0.0, 1e-40, -1e-45, np.inf, -np.inf, np.nan, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 65504, 1e-8]
    return np.concatenate([np.random.default_rng(0).normal(size=500), special]).astype(dtype).reshape(16, -1)


def expected_of(source: np.ndarray, target: np.dtype) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return source.astype(np.float32).astype(target)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("stored", STORED)
def test_every_value_becomes_the_nearest_one_of_the_dtype_wanted(stored, target):
    source = every_pattern(stored)
    expected = expected_of(source, target)
    is_in_range = np.isfinite(source.astype(np.float32)) <= np.isfinite(expected.astype(np.float32))
    source, expected = np.where(is_in_range, source, source.dtype.type(0)), np.where(is_in_range, expected, target.type(0))
    out = np.empty(source.shape, target)
    converter(stored, target)(source, out)
    is_nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(out.astype(np.float32)), is_nan)
    bits = f"u{target.itemsize}"
    np.testing.assert_array_equal(out.view(bits)[~is_nan], expected.view(bits)[~is_nan])


@pytest.mark.parametrize("stored", STORED)
def test_a_part_of_the_columns_can_be_converted(stored):
    source = every_pattern(stored)[:, 1:7]
    out = np.empty(source.shape, np.float32)
    converter(stored, np.dtype(np.float32))(source, out)
    np.testing.assert_array_equal(out, expected_of(source, np.dtype(np.float32)))


def test_a_value_beyond_float16_is_not_made_infinite():
    source = np.array([[1.0, 1e6]], ml_dtypes.bfloat16)
    with pytest.raises(FloatingPointError):
        converter("BF16", np.dtype(np.float16))(source, np.empty((1, 2), np.float16))
