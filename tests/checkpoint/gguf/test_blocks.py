"""Every type's blocks stand for the very floats that gguf's own reference makes of them."""
import hashlib

import numpy as np
import pytest

from tpllm.checkpoint.gguf.blocks import DENSE, KEPT
from tpllm.checkpoint.gguf.ggml_types import GGML_TYPES
from tpllm.weights.scheme import dequantize

HALVES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
          "Q2_K": (80, 82), "Q3_K": (108,), "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": (), "TQ1_0": (52,), "TQ2_0": (64,)}
"""Where float16 numbers stand in a block; all other bytes may have any value."""
TYPES = {kind.name: kind for kind in GGML_TYPES.values()}
DIGESTS = {
    "Q8_0": "c6fb5074b31a6d3c", "Q4_0": "3e3caf1e0fd18d72", "Q4_1": "ae8d8c31ea148ea2", "Q5_0": "61bbf91fd9b5d450",
    "Q5_1": "1078af9d59d19f5a", "Q4_K": "dc30df7ba9c16ac8", "Q5_K": "b5fa052023ad25eb", "Q6_K": "dd5203d1b044535c",
    "Q2_K": "b841bbced374872c", "Q3_K": "a581d91f3ea4632d", "IQ4_NL": "c9af48e0e6acb362", "IQ4_XS": "86fa62b9e96aea99",
    "MXFP4": "7c2d12bf4d76bc5d", "TQ1_0": "e376f33a5377916a", "TQ2_0": "bdff2bedfd04d59c",
}
"""Of gguf's floats; the oracle test below makes them again."""


def random_blocks(name: str, num_rows: int = 24, num_inputs: int = 512) -> np.ndarray:
    """uint8 [n, blocks, bytes of a block], the same on every machine."""
    kind = TYPES[name]
    raw = np.random.PCG64(7).random_raw(num_rows * num_inputs // kind.block * kind.block_bytes).astype(np.uint8)
    blocks = raw.reshape(num_rows, -1, kind.block_bytes)
    for start in HALVES[name]:
        blocks[..., start + 1] &= 0xBF  # no exponent of all ones: finite
    if name == "MXFP4":
        blocks[..., 0] = np.minimum(blocks[..., 0], 250)
    return blocks


def floats(name: str, blocks: np.ndarray) -> np.ndarray:
    if name in DENSE:
        return DENSE[name](blocks).reshape(blocks.shape[0], -1)
    scheme, rows = KEPT[name]
    return dequantize(rows(blocks), scheme) + np.float32(0 if name == "MXFP4" else -0.0)  # whose zeros have no sign in the reference


def digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", HALVES)
def test_blocks_stand_for_the_floats_of_the_reference(name):
    assert digest(floats(name, random_blocks(name))) == DIGESTS[name]


@pytest.mark.oracle
@pytest.mark.parametrize("name", HALVES)
def test_the_digests_are_those_of_the_gguf_package(name):
    gguf = pytest.importorskip("gguf", reason="gguf comes with the oracle extra")
    blocks = random_blocks(name)
    expected = gguf.quants.dequantize(blocks.reshape(blocks.shape[0], -1), gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(floats(name, blocks).view(np.uint32), expected.view(np.uint32))
    assert digest(expected) == DIGESTS[name]


@pytest.mark.oracle
def test_sizes_of_blocks_are_those_of_the_gguf_package():
    gguf = pytest.importorskip("gguf", reason="gguf comes with the oracle extra")
    for number, kind in GGML_TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == kind.name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (kind.block, kind.block_bytes)


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_type_takes_at_most_five_percent_more_than_in_the_file(name):
    scheme, rows = KEPT[name]
    assert scheme.bits_per_weight(4096) <= 1.05 * 8 * TYPES[name].block_bytes / TYPES[name].block
    kept = rows(random_blocks(name))
    assert (kept.codes.dtype, kept.scales.dtype, kept.scales.shape) == (scheme.code_dtype, scheme.scale_dtype, (24, scheme.num_groups(512)))
    assert kept.codes.shape == (24, 512)
    assert (kept.mins is None) == (scheme.mins == "none")
    assert kept.mins is None or kept.mins.dtype == scheme.min_dtype
    assert all(array is None or array.dtype == np.float16 for array in (kept.super_scales, kept.super_mins))
