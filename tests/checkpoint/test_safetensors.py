"""The reader of the file format, against files of the safetensors package and against damaged ones."""
import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from tpllm.checkpoint.safetensors import MAX_HEADER_BYTES, read_exactly, read_header, sample_digest
from tpllm.errors import CheckpointError

INTEGERS = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64)


def write_raw(path, header: bytes | dict, data: bytes = b"", *, length: int | None = None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def one(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize("dtype", [*INTEGERS, np.bool_, np.float16, np.float32, np.float64], ids=lambda dtype: dtype.__name__)
def test_every_plain_dtype_is_found_where_the_safetensors_package_put_it(tmp_path, dtype):
    tensors = {"a": np.arange(12).reshape(3, 4).astype(dtype), "empty": np.zeros((0, 5), dtype), "scalar": np.array(1, dtype)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"made": "by a test"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.tensors.keys() == tensors.keys()
    with open(header.path, "rb") as file:
        for name, value in tensors.items():
            entry = header.tensors[name]
            assert entry.shape == value.shape
            assert read_exactly(file, start=entry.start, num_bytes=entry.num_bytes) == value.tobytes()


BAD_HEADERS = {
    "not JSON": (b"{not json", "not valid JSON"),
    "not UTF-8": (b'{"\xff\xfe": 1}', "not valid JSON"),
    "JSON too deep": (b"{" + b'"a":{' * 100_000, "not valid JSON"),
    "a number too long": (b'{"w":' + b"9" * 5000 + b"}", "not valid JSON"),
    "a list": (b"[]", "starts with"),
    "empty": (b"", "starts with"),
    "a repeated tensor": (b'{"w": 1, "w": 2}', "'w' is there twice"),
    "an entry without fields": ({"w": {}}, "tensor 'w': needs dtype, shape and data_offsets"),
    "an entry that is a number": ({"w": 3}, "tensor 'w': needs dtype, shape and data_offsets"),
    "an unknown dtype": (one("F31"), "unknown dtype 'F31'; known: "),
    "a dtype that is a list": (one([]), "unknown dtype"),
    "a negative dim": (one(shape=(-2,)), "shape"),
    "a dim that is no whole number": (one(shape=(2.0,)), "shape"),
    "a dim that is true": (one(shape=(True, 2)), "shape"),
    "a dim beyond 64 bits": (one(shape=(2**70,)), "shape"),
    "too many dims": (one(shape=(1,) * 65), "shape"),
    "a size beyond 64 bits": (one(shape=(2**62,) * 64), "holds? 8"),
    "one offset": (one(offsets=(0,)), "data_offsets"),
    "offsets in the wrong order": (one(offsets=(8, 0)), "begin <= end"),
    "a size that is not the shape's": (one(shape=(3,)), r"F32 of shape \[3\] takes 12 bytes, its data_offsets \[0, 8\] hold 8"),
    "a size beyond the shape's": (one(shape=(1,)), r"F32 of shape \[1\] takes 4 bytes, its data_offsets \[0, 8\] hold 8"),
    "a gap before the first tensor": (one(offsets=(8, 16)), "leaves a gap before it"),
    "metadata that is a list": ({"__metadata__": [], **one()}, "__metadata__"),
    "metadata that is not text": ({"__metadata__": {"a": 1}, **one()}, "__metadata__"),
    "two tensors in one place": ({**one(), "v": one()["w"]}, "tensor '[vw]' overlaps the tensor before it"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_refused_with_the_file_and_what_is_wrong(tmp_path, case):
    header, message = BAD_HEADERS[case]
    path = write_raw(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert "x.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_truncated_file_is_refused_with_its_name_the_tensor_and_the_bytes(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"weight": np.zeros((5, 4), np.float32)}, path)
    size = path.stat().st_size
    os.truncate(path, size - 7)
    with pytest.raises(CheckpointError, match=f"x.safetensors is truncated: tensor 'weight' needs 80 bytes up to byte {size}, 73 are there"):
        read_header(path)


def test_bytes_after_the_last_tensor_are_refused(tmp_path):
    path = write_raw(tmp_path / "x.safetensors", one(), bytes(9))
    with pytest.raises(CheckpointError, match="its tensors end at byte"):
        read_header(path)


@pytest.mark.parametrize(("length", "message"), [(MAX_HEADER_BYTES + 1, "the format's limit is 100000000"), (2**64 - 1, "the format's limit"),
                                                 (5000, "truncated: its header needs 5000 bytes"), (73, "truncated: its header needs 73 bytes")])
def test_a_header_length_is_checked_before_anything_is_read(tmp_path, length, message):
    with pytest.raises(CheckpointError, match=message):
        read_header(write_raw(tmp_path / "x.safetensors", one(), bytes(8), length=length))


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_shorter_than_its_first_field_is_refused(tmp_path, size):
    (tmp_path / "x.safetensors").write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match=f"has {size} bytes; a safetensors file has at least 8"):
        read_header(tmp_path / "x.safetensors")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path / "x.safetensors")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(10))
    with open(path, "rb") as file, pytest.raises(CheckpointError, match="bytes 4 to 16 are needed, it ends at 10"):
        read_exactly(file, start=4, num_bytes=12)


def test_the_sample_digest_tells_files_of_one_header_apart(tmp_path):
    digests = set()
    for value in range(3):
        save_file({"w": np.full((300, 300), value, np.float32)}, tmp_path / "x.safetensors")
        digests.add(sample_digest(read_header(tmp_path / "x.safetensors")))
    assert len(digests) == 3
