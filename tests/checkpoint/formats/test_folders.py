"""Every kind of quantized folder, against the float32 weights that its packer says it stands for: equal to the last bit."""
import concurrent.futures

import numpy as np
import pytest

from tests.support.quantized_folders import KINDS, make_folder
from tpllm.checkpoint.read import TensorReader
from tpllm.weights.scheme import dequantize

DEQUANTIZED = ("bnb-nf4", "bnb-nf4-nested", "bnb-fp4", "compressed-nvfp4", "auto-round-nvfp4")


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_of_a_folder_is_what_was_packed(tmp_path, read, find_in, kind):
    weights = make_folder(tmp_path, kind)
    found, tensors = find_in(tmp_path)
    assert found.name in (KINDS[kind].config["quant_method"],)
    read_names = set()
    for name, weight in weights.items():
        matrix = found.find(name, weight.shape)
        if matrix is None:
            assert name in tensors
            read_names.add(name)
            continue
        assert matrix.shape == weight.shape
        np.testing.assert_array_equal(read(matrix), weight)
        read_names |= set(matrix.names)
    assert read_names == set(tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_quantized_and_what_it_takes(tmp_path, find_in, kind):
    weights = make_folder(tmp_path, kind)
    found, tensors = find_in(tmp_path)
    matrices = {name: matrix for name, weight in weights.items() if (matrix := found.find(name, weight.shape)) is not None}
    assert len(matrices) == 2 * 7 + KINDS[kind].has_head
    for matrix in matrices.values():
        assert (matrix.scheme is None) == (kind in DEQUANTIZED), matrix.names
        assert matrix.bits_per_weight * np.prod(matrix.shape) / 8 == pytest.approx(sum(tensors[name].num_bytes for name in matrix.names))
        assert (matrix.order is not None) == kind.endswith("-act")


@pytest.mark.parametrize("kind", ["gptq-3bit-g64-asym", "gptq-4bit-g32-sym-act", "awq-g32", "fp8-block", "bnb-nf4-nested",
                                  "compressed-w3a16-g32-asym", "compressed-nvfp4"])
def test_threads_read_rows_of_one_matrix_at_once(tmp_path, read, find_in, kind):
    weights = make_folder(tmp_path, kind)
    name = "model.layers.1.mlp.down_proj.weight"
    matrix = find_in(tmp_path)[0].find(name, weights[name].shape)
    with TensorReader(1) as reader, concurrent.futures.ThreadPoolExecutor(8) as pool:
        rows = matrix.open(reader)
        parts = list(pool.map(lambda first: rows(first, first + 1), range(matrix.shape[0])))
    whole = np.concatenate([part if matrix.scheme is None else dequantize(part, matrix.scheme) for part in parts])
    if matrix.order is not None:
        whole[:, matrix.order] = whole.copy()
    np.testing.assert_array_equal(whole, weights[name])


SCHEMES = {
    "gptq-4bit-g32-sym": (4, 32, 8, "none", "float16"), "gptq-4bit-g-1-sym": (4, 0, 8, "none", "float16"),
    "gptq-4bit-g32-asym": (4, 32, 0, "zeros", "float16"), "gptq-3bit-g128-sym": (3, 0, 4, "none", "float16"),
    "gptq-2bit-g64-asym": (2, 64, 0, "zeros", "float16"), "gptq-8bit-g32-sym": (8, 32, 0, "none", "float16"),
    "gptq-8bit-g32-asym": (8, 32, 0, "float", "float32"), "awq-g32": (4, 32, 0, "zeros", "float16"), "awq-g32-sym": (4, 32, 8, "none", "float16"),
    "fp8-block": (8, 0, 0, "none", "float32"), "fp8-tensor": (8, 0, 0, "none", "float32"), "compressed-fp8-channel": (8, 0, 0, "none", "bfloat16"),
    "compressed-w4a16-g32-sym": (4, 32, 8, "none", "bfloat16"), "compressed-w8a8": (8, 0, 0, "none", "bfloat16"),
    "compressed-w8a16-g32-asym": (8, 32, 0, "float", "float32"), "compressed-w6a16-channel-asym": (6, 0, 0, "zeros", "bfloat16"),
    "bnb-int8": (8, 0, 0, "none", "float32"), "compressed-mxfp4": (4, 32, 0, "none", "uint8")}


@pytest.mark.parametrize("kind", SCHEMES)
def test_codes_keep_their_small_form_and_scales_their_dtype(tmp_path, find_in, kind):
    weights = make_folder(tmp_path, kind)
    name = "model.layers.0.self_attn.q_proj.weight"
    scheme = find_in(tmp_path)[0].find(name, weights[name].shape).scheme
    assert (scheme.bits, scheme.group, scheme.zero, scheme.mins, scheme.scale_dtype.name) == SCHEMES[kind]
    assert scheme.quantizes_input == (kind == "compressed-w8a8")


def test_block_scales_are_one_for_a_row_and_a_block_of_inputs(tmp_path, find_in):
    weights = make_folder(tmp_path, "fp8-block")
    name = "model.layers.0.mlp.down_proj.weight"
    scheme = find_in(tmp_path)[0].find(name, weights[name].shape).scheme
    assert (scheme.kind, scheme.group, scheme.scale_dtype) == ("e4m3", 128, np.float32)
