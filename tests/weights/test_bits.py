"""Codes of few bits in bytes: the bit string they make, and back, by numpy and jax."""
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding_rules import TENSOR, Partition, make_mesh
from tpllm.weights.bits import num_bytes, pack_bits, unpack_bits
from tpllm.weights.scheme import Scheme
from tpllm.weights.xla import XlaLayout


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 7), shape=st.tuples(st.integers(0, 3), st.integers(0, 41)), seed=st.integers(0, 99))
def test_codes_are_one_string_of_bits(bits, shape, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (shape[0], num_bytes(shape[1], bits))
    padded = np.pad(codes, ((0, 0), (0, -shape[1] % 8)))
    string = np.unpackbits(padded[..., None], axis=-1, bitorder="little")[..., :bits].reshape(shape[0], padded.shape[1] * bits)
    np.testing.assert_array_equal(packed, np.packbits(string, axis=-1, bitorder="little"))
    np.testing.assert_array_equal(unpack_bits(packed, bits, shape[1]), codes)


@pytest.mark.parametrize("shape", [(3, 41), (2, 16), (1, 5), (0, 8)])
@pytest.mark.parametrize("bits", range(1, 8))
def test_jax_makes_the_same_bytes_as_numpy(bits, shape):
    codes = np.random.default_rng(bits).integers(0, 2**bits, shape).astype(np.uint8)
    packed, back = jax.jit(lambda codes: (pack_bits(codes, bits), unpack_bits(pack_bits(codes, bits), bits, shape[1])))(codes)
    np.testing.assert_array_equal(packed, pack_bits(codes, bits))
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_no_matrix_takes_more_than_five_percent_over_its_bits(bits, tp):
    scheme = Scheme(f"{bits} bits", bits, 128, zero=0 if bits == 8 else 2 ** (bits - 1), scale_dtype=np.dtype(np.float16))
    layout = XlaLayout.of(scheme, (64, 1024), (None, "mlp"), Partition(make_mesh({"tp": tp}), TENSOR))
    item_bits = {"uint2": 2, "uint4": 4}
    kept = sum(int(np.prod(shape)) * item_bits.get(str(dtype), 8 * dtype.itemsize) for shape, dtype, _ in layout.arrays().values())
    assert kept <= 1.05 * 64 * 1024 * scheme.bits_per_weight(1024)
    assert layout.has_packed_codes == (bits in (3, 5, 6))
