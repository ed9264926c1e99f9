"""Rows of files from llama.cpp's own quantizer are bit-equal to what the gguf package makes of them."""
import numpy as np
import pytest

from tests.support.gguf_files import HF_LLAMA, gguf_tensor_name, write_gguf
from tpllm.checkpoint.gguf.header import open_gguf
from tpllm.checkpoint.gguf.weights import GgufFormat
from tpllm.checkpoint.read import TensorReader
from tpllm.weights.scheme import dequantize

pytestmark = pytest.mark.oracle
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q2_K", "Q3_K_M", "IQ4_NL", "IQ4_XS",
         "TQ1_0", "TQ2_0")
ROWS = 37
"""Asked for at a time: no multiple of a head."""


def in_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    return weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("kind", TYPES)
def test_rows_of_a_quantized_file_are_those_of_the_gguf_package(tmp_path, kind):
    gguf = pytest.importorskip("gguf", reason="gguf comes with the oracle extra")
    path = tmp_path / "model.gguf"
    weights = write_gguf(path, HF_LLAMA, kind)
    opened = open_gguf(path)
    found, reference = GgufFormat(opened), {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert opened.tensors.keys() == reference.keys()
    with TensorReader() as reader:
        for name in map(gguf_tensor_name, weights):
            tensor = reference[name]
            shape = tuple(int(size) for size in tensor.shape[::-1])
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
            for part, heads in (("attn_q", "num_attention_heads"), ("attn_k", "num_key_value_heads")):
                expected = in_halves(expected, HF_LLAMA[heads]) if f"{part}.weight" in name else expected
            matrix = found.find(name, shape)
            if matrix is None:
                rows = [found_rows(reader, opened, name)]
            else:
                read = matrix.open(reader)
                rows = [read(first, min(first + ROWS, shape[0])) for first in range(0, shape[0], ROWS)]
            floats = [part if isinstance(part, np.ndarray) else dequantize(part, matrix.scheme) for part in rows]
            np.testing.assert_array_equal(np.concatenate(floats).view(np.uint32), expected.view(np.uint32), err_msg=name)


def found_rows(reader: TensorReader, opened, name: str) -> np.ndarray:
    return reader.read_raw(opened.tensors[name]).astype(np.float32)
