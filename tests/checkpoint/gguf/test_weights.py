"""Rows of a GGUF file are the rows of the checkpoint it was made from."""
import struct

import numpy as np
import pytest

from tests.support.gguf_files import alternate_halves, raw_gguf, raw_key, raw_tensor, raw_text
from tpllm.checkpoint.gguf.header import open_gguf
from tpllm.checkpoint.gguf.weights import GgufFormat
from tpllm.checkpoint.read import TensorReader
from tpllm.errors import CheckpointError
from tpllm.weights.scheme import dequantize

HEADS, KV_HEADS, HEAD_DIM, D = 4, 2, 6, 64


def write(path, tensors: dict[str, tuple[tuple[int, ...], int, bytes]], *, arch: str = "llama"):
    """A file of tensors name -> (dims in ggml's order, type, bytes)."""
    metadata = raw_key("general.architecture", 8, raw_text(arch))
    for key, value in (("attention.head_count", HEADS), ("attention.head_count_kv", KV_HEADS)):
        metadata += raw_key(f"{arch}.{key}", 4, struct.pack("<I", value))
    table, data = b"", b""
    for name, (dims, kind, raw) in tensors.items():
        table += raw_tensor(name, dims, kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    path.write_bytes(raw_gguf(metadata, table, data, num_keys=3, num_tensors=len(tensors)))
    return GgufFormat(open_gguf(path))


def float_tensor(values: np.ndarray) -> tuple[tuple[int, ...], int, bytes]:
    kind = 0 if values.dtype == np.float32 else 1
    return values.shape[::-1], kind, values.tobytes()


def q8_0(codes: np.ndarray, scales: np.ndarray) -> tuple[tuple[int, ...], int, bytes]:
    blocks = [np.ascontiguousarray(scales)[..., None].view(np.uint8), codes.reshape(*scales.shape, 32).view(np.uint8)]
    return codes.shape[::-1], 8, np.concatenate(blocks, axis=-1).tobytes()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(("name", "num_heads"), [("attn_q", HEADS), ("attn_k", KV_HEADS)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_alternating_heads_come_in_halves_whatever_rows_are_asked_for(tmp_path, rng, name, num_heads, dtype):
    weight = rng.normal(size=(num_heads * HEAD_DIM, D)).astype(dtype)
    bias = rng.normal(size=num_heads * HEAD_DIM).astype(np.float32)
    weights = write(tmp_path / "model.gguf", {f"blk.0.{name}.weight": float_tensor(alternate_halves(weight, num_heads)),
                                              f"blk.0.{name}.bias": float_tensor(alternate_halves(bias, num_heads))})
    for part, expected in (("weight", weight), ("bias", bias)):
        matrix = weights.find(f"blk.0.{name}.{part}", expected.shape)
        assert matrix.shape == expected.shape
        assert matrix.scheme is None
        with TensorReader() as reader:
            rows = matrix.open(reader)
            for first in range(len(expected)):
                for last in range(first, len(expected) + 1):
                    found = rows(first, last)
                    assert found.dtype == np.float32
                    np.testing.assert_array_equal(found, expected[first:last].astype(np.float32))


def test_quantized_heads_come_in_halves(tmp_path, rng):
    codes, scales = rng.integers(-128, 128, (HEADS * HEAD_DIM, D)).astype(np.int8), rng.normal(size=(HEADS * HEAD_DIM, D // 32)).astype(np.float16)
    weights = write(tmp_path / "model.gguf", {"blk.1.attn_q.weight": q8_0(alternate_halves(codes, HEADS), alternate_halves(scales, HEADS))})
    matrix = weights.find("blk.1.attn_q.weight", codes.shape)
    with TensorReader() as reader:
        rows = matrix.open(reader)(5, 14)
    np.testing.assert_array_equal(rows.codes, codes[5:14])
    np.testing.assert_array_equal(rows.scales, scales[5:14])
    np.testing.assert_array_equal(dequantize(rows, matrix.scheme), codes[5:14] * np.repeat(scales[5:14].astype(np.float32), 32, axis=1))


@pytest.mark.parametrize("name", ["blk.0.attn_v.weight", "blk.0.attn_output.weight", "token_embd.weight", "blk.0.attn_norm.weight"])
def test_plain_tensors_that_need_no_change_are_left_to_the_plain_reader(tmp_path, rng, name):
    weight = rng.normal(size=(D, D) if "norm" not in name else D).astype(np.float32)
    weights = write(tmp_path / "model.gguf", {name: float_tensor(weight)})
    assert weights.find(name, weight.shape) is None
    with TensorReader() as reader:
        np.testing.assert_array_equal(reader.read_raw(weights.tensors[name]), weight)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "phi3"])
def test_heads_of_other_architectures_stay_as_they_are(tmp_path, rng, arch):
    weight = rng.normal(size=(HEADS * HEAD_DIM, D)).astype(np.float32)
    weights = write(tmp_path / "model.gguf", {"blk.0.attn_q.weight": float_tensor(weight)}, arch=arch)
    assert weights.find("blk.0.attn_q.weight", weight.shape) is None


@pytest.mark.parametrize("arch", ["gemma", "gemma2", "gemma3"])
def test_norms_of_gemma_come_without_the_one_that_was_added(tmp_path, rng, arch):
    norm = rng.normal(size=D).astype(np.float32)
    weights = write(tmp_path / "model.gguf", {"blk.0.attn_norm.weight": float_tensor(norm + np.float32(1))}, arch=arch)
    with TensorReader() as reader:
        found = weights.find("blk.0.attn_norm.weight", (D,)).open(reader)(3, D)
    np.testing.assert_array_equal(found, (norm + np.float32(1) - np.float32(1))[3:])


def test_experts_in_one_tensor_count_as_one_matrix_after_the_other(tmp_path, rng):
    codes, scales = rng.integers(-128, 128, (3, 5, D)).astype(np.int8), rng.normal(size=(3, 5, D // 32)).astype(np.float16)
    weights = write(tmp_path / "model.gguf", {"blk.0.ffn_up_exps.weight": q8_0(codes, scales)})
    matrix = weights.find("blk.0.ffn_up_exps.weight", (15, D))
    assert matrix.shape == (15, D)
    with TensorReader() as reader:
        np.testing.assert_array_equal(matrix.open(reader)(4, 11).codes, codes.reshape(15, D)[4:11])


def test_types_without_a_scheme_are_named_with_what_they_cost(tmp_path, caplog):
    raw = np.zeros((4, 84), np.uint8)
    weights = write(tmp_path / "model.gguf", {"blk.0.ffn_up.weight": ((256, 4), 10, raw.tobytes())})
    assert "1 tensors of Q2_K are dequantized" in caplog.text
    matrix = weights.find("blk.0.ffn_up.weight", (4, 256))
    assert matrix.scheme is None
    with TensorReader() as reader:
        rows = matrix.open(reader)(1, 3)
    assert (rows.dtype, rows.shape) == (np.float32, (2, 256))


def test_scales_that_are_not_finite_are_refused(tmp_path):
    scales = np.full((2, 2), np.float16(np.inf))
    weights = write(tmp_path / "model.gguf", {"blk.0.ffn_up.weight": q8_0(np.ones((2, D), np.int8), scales)})
    with TensorReader() as reader, pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight.*not finite"):
        weights.find("blk.0.ffn_up.weight", (2, D)).open(reader)(0, 2)


def test_powers_of_two_that_are_no_number_are_refused(tmp_path):
    raw = np.zeros((2, 4, 17), np.uint8)
    raw[1, 2, 0] = 255
    weights = write(tmp_path / "model.gguf", {"blk.0.ffn_up.weight": ((128, 2), 39, raw.tobytes())})
    with TensorReader() as reader:
        rows = weights.find("blk.0.ffn_up.weight", (2, 128)).open(reader)
        assert rows(0, 1).scales.shape == (1, 4)
        with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight.*not finite"):
            rows(0, 2)


def test_a_type_that_is_not_read_is_refused_by_name(tmp_path):
    weights = write(tmp_path / "model.gguf", {"blk.0.ffn_up.weight": ((256, 1), 24, bytes(256))})
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight.*I8, which is not read.*llama-quantize"):
        weights.find("blk.0.ffn_up.weight", (1, 256))


def test_heads_that_do_not_divide_the_rows_are_refused(tmp_path, rng):
    weights = write(tmp_path / "model.gguf", {"blk.0.attn_q.weight": float_tensor(rng.normal(size=(HEADS * 3, D)).astype(np.float32))})
    with pytest.raises(CheckpointError, match=r"12 rows, which 4 heads .*do not divide"):
        weights.find("blk.0.attn_q.weight", (HEADS * 3, D))


@pytest.mark.parametrize("bits", [0x7F800001, 0xFFFFFFFF])
def test_plain_values_that_are_no_number_are_passed_on_without_a_warning(tmp_path, bits):
    norm = np.full(D, bits, np.uint32).view(np.float32)
    weights = write(tmp_path / "model.gguf", {"blk.0.attn_norm.weight": float_tensor(norm)}, arch="gemma")
    with TensorReader() as reader:
        assert np.isnan(weights.find("blk.0.attn_norm.weight", (D,)).open(reader)(0, D)).all()
