"""Types that the gguf package reads, Q8_K, and the scales that NVFP4 has beside its blocks."""
import ctypes
import logging
import pathlib
import struct

import gguf
import numpy as np
import pytest

from tests.support.gguf_files import raw_gguf, raw_key, raw_tensor, raw_text
from tpllm.checkpoint.gguf import weights as gguf_weights
from tpllm.checkpoint.gguf.blocks import DENSE, OF_GGUF
from tpllm.checkpoint.gguf.ggml_types import GGML_TYPES
from tpllm.checkpoint.gguf.header import open_gguf
from tpllm.checkpoint.gguf.weights import GgufFormat
from tpllm.checkpoint.read import TensorReader
from tpllm.errors import CheckpointError

NUMBERS = {kind.name: number for number, kind in GGML_TYPES.items()}
SHAPE = (6, 512)


def random_bytes(name: str, shape=SHAPE) -> np.ndarray:
    """uint8 [rows, bytes of a row] whose scales are finite."""
    kind = GGML_TYPES[NUMBERS[name]]
    blocks = np.random.default_rng(3).integers(0, 256, (*shape[:-1], shape[-1] // kind.block, kind.block_bytes), np.uint8)
    blocks[..., 1] &= 0xBF  # the scale, a float16 of the first two bytes
    if name == "IQ1_M":  # it lies in the upper halves of the last four
        blocks[..., 55] &= 0xBF
    if name == "Q8_K":
        blocks[..., :4] = np.random.default_rng(4).normal(size=blocks.shape[:-1]).astype(np.float32)[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write(path, tensors) -> GgufFormat:
    """A file of tensors name -> (shape, type, bytes)."""
    table, data = b"", b""
    for name, (shape, kind, raw) in tensors.items():
        table += raw_tensor(name, shape[::-1], NUMBERS[kind], len(data))
        data += raw + bytes(-len(raw) % 32)
    metadata = raw_key("general.architecture", 8, raw_text("qwen2")) + raw_key("qwen2.attention.head_count", 4, struct.pack("<I", 2))
    path.write_bytes(raw_gguf(metadata, table, data, num_keys=2, num_tensors=len(tensors)))
    return GgufFormat(open_gguf(path))


def read(weights: GgufFormat, name: str, shape) -> np.ndarray:
    matrix = weights.find(name, shape)
    assert matrix.scheme is None
    with TensorReader(1) as reader:
        rows = matrix.open(reader)
        return np.concatenate([rows(0, 2), rows(2, shape[0])])


@pytest.mark.parametrize("name", OF_GGUF)
def test_a_type_of_the_gguf_package_is_read_by_it_with_a_line_in_the_log(tmp_path, name, caplog):
    raw = random_bytes(name)
    with caplog.at_level(logging.WARNING, logger="tpllm"):
        weights = write(tmp_path / "model.gguf", {"w.weight": (SHAPE, name, raw.tobytes())})
    np.testing.assert_array_equal(read(weights, "w.weight", SHAPE), gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]))
    (record,) = caplog.records
    assert f"1 tensors of {name} are dequantized" in record.getMessage()


def test_q8_k_is_a_float_and_codes(tmp_path):
    raw = random_bytes("Q8_K")
    blocks = raw.reshape(SHAPE[0], -1, 292)
    expected = blocks[..., :4].copy().view("<f4") * blocks[..., 4:260].view(np.int8).astype(np.float32)
    weights = write(tmp_path / "model.gguf", {"w.weight": (SHAPE, "Q8_K", raw.tobytes())})
    np.testing.assert_array_equal(read(weights, "w.weight", SHAPE), expected.reshape(SHAPE))


@pytest.mark.parametrize("kind", ["NVFP4", "Q8_0", "F32"])
def test_scales_beside_a_tensor_multiply_it_one_for_all_or_one_for_each_expert(tmp_path, kind):
    shape = (3, 4, 64)
    raw = random_bytes(kind, shape) if kind != "F32" else np.random.default_rng(0).normal(size=shape).astype(np.float32)
    plain = raw if kind == "F32" else gguf.quants.dequantize(raw.reshape(12, -1), gguf.GGMLQuantizationType[kind])
    plain, each = plain.reshape(12, 64), np.array([0.5, 3, 0.1], np.float32)
    one, same = np.array([0.25], np.float32), np.ones(1, np.float32)
    weights = write(tmp_path / "model.gguf", {
        "a.weight": (shape, kind, raw.tobytes()), "a.scale": ((3,), "F32", each.tobytes()), "a.input_scale": ((3,), "F32", each.tobytes()),
        "b.weight": ((12, 64), kind, raw.tobytes()), "b.scale": ((1,), "F32", one.tobytes()),
        "c.weight": ((12, 64), kind, raw.tobytes()), "c.scale": ((1,), "F32", same.tobytes())})
    np.testing.assert_array_equal(read(weights, "a.weight", (12, 64)), plain * np.repeat(each, 4)[:, None])
    np.testing.assert_array_equal(read(weights, "b.weight", (12, 64)), plain * np.float32(0.25))
    assert set(weights.find("a.weight", (12, 64)).names) == {"a.weight", "a.scale", "a.input_scale"}
    assert (weights.find("c.weight", (12, 64)) is None) == (kind == "F32")
    assert kind != "Q8_0" or weights.find("c.weight", (12, 64)).scheme is not None


def test_scales_of_another_number_are_refused(tmp_path):
    weights = write(tmp_path / "model.gguf", {"a.weight": ((2, 64), "NVFP4", random_bytes("NVFP4", (2, 64)).tobytes()),
                                              "a.scale": ((2,), "F32", np.ones(2, np.float32).tobytes())})
    with pytest.raises(CheckpointError, match=r"'a.scale' has 2 values .* it must have one, or one for each expert"):
        weights.find("a.weight", (2, 64))


def test_without_the_gguf_package_such_a_file_is_refused_with_what_to_install(tmp_path, monkeypatch):
    weights = write(tmp_path / "model.gguf", {"w.weight": (SHAPE, "IQ2_XS", random_bytes("IQ2_XS").tobytes())})
    monkeypatch.setattr(gguf_weights, "has_gguf", lambda: False)
    with pytest.raises(CheckpointError, match=r"'w.weight' is IQ2_XS, which the gguf package reads; .*pip install 'gguf>=0.19'"):
        weights.find("w.weight", SHAPE)


@pytest.mark.oracle
@pytest.mark.parametrize("name", DENSE)
def test_rows_are_those_of_ggmls_own_functions(name):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python comes with the oracle extra")
    library = ctypes.CDLL(str(pathlib.Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    raw, expected = random_bytes(name), np.empty(SHAPE, np.float32)
    function = getattr(library, f"dequantize_row_{name.lower().replace('_k', '_K')}")
    function(ctypes.c_void_p(raw.ctypes.data), ctypes.c_void_p(expected.ctypes.data), ctypes.c_int64(expected.size))
    kind = GGML_TYPES[NUMBERS[name]]
    with np.errstate(all="ignore"):
        found = DENSE[name](raw.reshape(SHAPE[0], -1, kind.block_bytes)).reshape(SHAPE)
    np.testing.assert_array_equal(found, expected)
