"""GGUF headers: what is read of a good file, and that each kind of damage is refused by name before anything is allocated for it."""
import struct
import time
import tracemalloc

import numpy as np
import pytest

from tests.support.gguf_files import raw_gguf, raw_key, raw_metadata, raw_model, raw_tensor, raw_text
from tpllm.checkpoint.gguf.header import open_gguf
from tpllm.errors import CheckpointError

HUGE = 2**63 + 5
ONE_TENSOR = raw_tensor("w", (8,), 0, 0)


def u64(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def nested(depth: int) -> bytes:
    return array(9, 1, nested(depth - 1)) if depth else array(0, 0)


def keys(*pairs: bytes) -> bytes:
    return raw_gguf(b"".join(pairs), num_keys=len(pairs))


def table(*lines: bytes, data: bytes = bytes(64), metadata: bytes = b"", num_keys: int = 0) -> bytes:
    return raw_gguf(metadata, b"".join(lines), data, num_tensors=len(lines), num_keys=num_keys)


DAMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"the magic number needs 4 bytes.*truncated"),
    "cut in the counts": (raw_gguf()[:20], r"count of keys needs 8 bytes"),
    "magic": (raw_gguf(magic=b"GGML"), r"starts with b'GGML', not b'GGUF'"),
    "version 1": (raw_gguf(version=1), r"version 1 of GGUF; versions 2 and 3"),
    "version 9": (raw_gguf(version=9), r"version 9 of GGUF"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), r"big-endian.*gguf_convert_endian"),
    "count of tensors": (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0), rf"table of tensors counts {HUGE} items"),
    "count of keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE), rf"metadata counts {HUGE} items"),
    "length of a key": (raw_gguf(u64(HUGE) + bytes(32), num_keys=1), r"key 0 has \d+ bytes; the limit is 65535"),
    "key not UTF-8": (keys(raw_key("x", 0, b"\1").replace(b"x", b"\xff")), r"key 0 is not UTF-8"),
    "key twice": (keys(raw_key("a", 0, b"\1"), raw_key("a", 0, b"\1")), r"key 'a' is there twice"),
    "type of a value": (keys(raw_key("a", 13, b"\1")), r"key 'a' has the unknown type 13"),
    "boolean": (keys(raw_key("a", 7, b"\2")), r"key 'a' is the boolean 2"),
    "booleans": (keys(raw_key("a", 9, array(7, 3, b"\0\1\5"))), r"key 'a' holds the boolean 5"),
    "text too long": (keys(raw_key("a", 8, u64(HUGE))), rf"key 'a' needs {HUGE} bytes"),
    "text not UTF-8": (keys(raw_key("a", 8, raw_text(b"\xc3("))), r"key 'a' is not UTF-8"),
    "count of an array": (keys(raw_key("a", 9, array(4, 2**62))), r"key 'a' counts \d+ items of 4 or more bytes"),
    "count that overflows": (keys(raw_key("a", 9, array(10, 2**61 + 1))), r"key 'a' counts \d+ items of 8"),
    "count of texts": (keys(raw_key("a", 9, array(8, 2**40))), r"key 'a' counts \d+ items of 8 or more bytes"),
    "count of texts that have no room": (keys(raw_key("a", 9, array(8, 16, bytes(64)))), r"key 'a' counts 16 items of 8 or more bytes"),
    "text in an array too long": (keys(raw_key("a", 9, array(8, 1, u64(2**40)))), r"an item of key 'a' needs \d+ bytes"),
    "text in an array not UTF-8": (keys(raw_key("a", 9, array(8, 1, raw_text(b"\xff")))), r"item 0 of key 'a' is not UTF-8"),
    "type of items": (keys(raw_key("a", 9, array(77, 1, b"\0" * 8))), r"items of key 'a' have the unknown type 77"),
    "arrays too deep": (keys(raw_key("a", 9, nested(6))), r"key 'a' has arrays in arrays, more than 4 deep"),
    "alignment 0": (keys(raw_key("general.alignment", 4, bytes(4))), r"general\.alignment is 0; it must be a power of two"),
    "alignment 48": (keys(raw_key("general.alignment", 4, struct.pack("<I", 48))), r"general\.alignment is 48"),
    "alignment of text": (keys(raw_key("general.alignment", 8, raw_text("32"))), r"general\.alignment is '32'"),
    "tensor twice": (table(ONE_TENSOR, raw_tensor("w", (8,), 0, 32)), r"tensor 'w' is there twice"),
    "no dims": (table(raw_text("w") + struct.pack("<IIQ", 0, 0, 0) + bytes(16)), r"tensor 'w' has 0 dims"),
    "5 dims": (table(raw_tensor("w", (1,) * 5, 0, 0)), r"tensor 'w' has 5 dims; it must have 1 to 4"),
    "a dim of 0": (table(raw_tensor("w", (8, 0), 0, 0)), r"tensor 'w' has shape \(0, 8\).*at least 1"),
    "a dim too large": (table(raw_tensor("w", (HUGE,), 0, 0)), r"tensor 'w' has shape"),
    "product that overflows": (table(raw_tensor("w", (2**32, 2**32), 0, 0)), r"tensor 'w' has shape .*below 2\*\*63"),
    "type of a tensor": (table(raw_tensor("w", (8,), 99, 0)), r"tensor 'w' is of the ggml type 99"),
    "removed type": (table(raw_tensor("w", (8,), 4, 0)), r"tensor 'w' is of the ggml type 4"),
    "half a block": (table(raw_tensor("w", (48, 1), 8, 0)), r"rows of 48 values are no multiple of Q8_0's blocks of 32"),
    "offset not aligned": (table(raw_tensor("w", (4,), 0, 8)), r"offset 8 is no multiple of general\.alignment 32"),
    "offset beyond the file": (table(raw_tensor("w", (8,), 0, 2**40)), r"truncated: tensor 'w' \(F32, shape \(8,\)\) needs bytes"),
    "offset near 2**64": (table(raw_tensor("w", (8,), 0, 2**64 - 32)), r"truncated: tensor 'w'"),
    "overlap": (table(raw_tensor("v", (16,), 0, 0), raw_tensor("w", (8,), 0, 32)), r"tensor 'w' begins at byte \d+, within the tensor before it"),
    "values cut": (table(ONE_TENSOR, data=bytes(31)), r"truncated: tensor 'w'.*the file has"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_by_name_at_once_and_without_memory(tmp_path, kind):
    raw, message = DAMAGE[kind]
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            open_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)


def test_every_type_of_value_is_read(tmp_path):
    values = {0: ("<B", 200), 1: ("<b", -100), 2: ("<H", 60000), 3: ("<h", -30000), 4: ("<I", 2**32 - 1), 5: ("<i", -2**31), 6: ("<f", 0.5),
              7: ("<?", True), 10: ("<Q", 2**64 - 1), 11: ("<q", -2**63), 12: ("<d", 0.1)}
    metadata = b"".join(raw_key(f"one.{kind}", kind, struct.pack(form, value)) for kind, (form, value) in values.items())
    metadata += b"".join(raw_key(f"many.{kind}", 9, array(kind, 2, struct.pack(form, value) * 2)) for kind, (form, value) in values.items())
    metadata += raw_key("text", 8, raw_text("né")) + raw_key("texts", 9, array(8, 3, raw_text("a") + raw_text("") + raw_text("ż")))
    metadata += raw_key("nested", 9, array(9, 2, array(0, 2, b"\1\2") + array(8, 1, raw_text("x"))))
    (tmp_path / "model.gguf").write_bytes(raw_gguf(metadata, num_keys=25))
    found = open_gguf(tmp_path / "model.gguf").metadata
    for kind, (_, value) in values.items():
        assert found[f"one.{kind}"] == value
        assert type(found[f"one.{kind}"]) is type(value)
        assert found[f"many.{kind}"].tolist() == [value, value]
        assert not found[f"many.{kind}"].flags.writeable
    assert (found["text"], found["texts"]) == ("né", ("a", "", "ż"))
    assert found["nested"][0].tolist() == [1, 2]
    assert found["nested"][1] == ("x",)
    with pytest.raises(TypeError):
        found["text"] = "other"


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_tensors_have_numpy_shapes_and_begin_at_the_alignment(tmp_path, alignment):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(24, dtype=np.float32).reshape(2, 3, 4)}
    metadata = {} if alignment is None else {"general.alignment": alignment}
    path = tmp_path / "model.gguf"
    path.write_bytes(raw_model(metadata, tensors, alignment=alignment or 32))
    gguf = open_gguf(path)
    raw = path.read_bytes()
    for name, values in tensors.items():
        tensor = gguf.tensors[name]
        assert tensor.shape == values.shape
        assert tensor.start % (alignment or 32) == 0
        np.testing.assert_array_equal(np.frombuffer(raw[tensor.start:tensor.stop], np.float32).reshape(values.shape), values)


def write_split(folder, *, numbers=(0, 1, 2), total: int = 3, names=("a", "b", "c")):
    for index, (number, name) in enumerate(zip(numbers, names, strict=True)):
        metadata = struct.pack("<H", number), struct.pack("<H", 3), struct.pack("<i", total)
        kinds = (("split.no", 2), ("split.count", 2), ("split.tensors.count", 5))
        raw = b"".join(raw_key(key, kind, value) for (key, kind), value in zip(kinds, metadata, strict=True))
        raw += raw_key("general.architecture", 8, raw_text("llama")) if index == 0 else b""
        raw = raw_gguf(raw, raw_tensor(name, (8,), 0, 0), bytes(32), num_keys=4 if index == 0 else 3, num_tensors=1)
        (folder / f"m-{index + 1:05d}-of-00003.gguf").write_bytes(raw)


@pytest.mark.parametrize("given", [1, 2, 3])
def test_any_part_of_a_split_model_opens_all(tmp_path, given):
    write_split(tmp_path)
    gguf = open_gguf(tmp_path / f"m-{given:05d}-of-00003.gguf")
    assert list(gguf.tensors) == ["a", "b", "c"]
    assert [header.path.name for header in gguf.headers] == [f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    assert gguf.path.name == "m-00001-of-00003.gguf"
    assert gguf.arch == "llama"


def test_a_split_model_with_something_wrong_is_refused_by_the_files_name(tmp_path):
    first = tmp_path / "m-00001-of-00003.gguf"
    for damage, message in (({"numbers": (0, 2, 1)}, r"m-00002.*split\.no and split\.count are \(2, 3\)"), ({"total": 4}, r"hold 3 tensors"),
                            ({"names": ("a", "b", "a")}, r"m-00003.*tensor 'a' is in m-00001")):
        write_split(tmp_path, **damage)
        with pytest.raises(CheckpointError, match=message):
            open_gguf(first)
    write_split(tmp_path)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf is missing: the model is split into 3 files"):
        open_gguf(first)
    first.rename(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"one of 3 files .*must keep their names"):
        open_gguf(tmp_path / "other.gguf")


def test_a_large_vocabulary_is_read_in_about_a_second(tmp_path):
    tokens = [f"token{i}" for i in range(250_000)]
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": [f"a{i} b{i}" for i in range(250_000)],
                "tokenizer.ggml.scores": [0.0] * 250_000}
    (tmp_path / "model.gguf").write_bytes(raw_gguf(raw_metadata(metadata), num_keys=3))
    start = time.perf_counter()
    found = open_gguf(tmp_path / "model.gguf").metadata
    assert time.perf_counter() - start < 5  # about 0.2 s on an idle machine
    assert found["tokenizer.ggml.tokens"] == tuple(tokens)
    assert len(found["tokenizer.ggml.scores"]) == 250_000
