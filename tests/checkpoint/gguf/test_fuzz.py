"""Whatever is done to a GGUF file's bytes, opening it and reading all of it ends in a TpllmError or in a model, soon and in little memory."""
import math
import os
import random
import struct
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.gguf_files import raw_gguf, raw_metadata, raw_model, raw_tensor
from tpllm.checkpoint.folder import open_checkpoint
from tpllm.checkpoint.gguf.blocks import DENSE, KEPT
from tpllm.checkpoint.gguf.config import config_from_gguf
from tpllm.checkpoint.gguf.ggml_types import GGML_TYPES
from tpllm.checkpoint.gguf.header import open_gguf
from tpllm.checkpoint.gguf.weights import GgufFormat
from tpllm.checkpoint.read import TensorReader
from tpllm.errors import TpllmError
from tpllm.tokenizer.decoder_stages import byte_of_character
from tpllm.tokenizer.gguf import tokenizer_from_gguf

MAX_SECONDS, MAX_BYTES = 5, 2**26
NUM_PLAIN, NUM_SLOW = 300, 10_000
SETTINGS = settings(max_examples=NUM_PLAIN, deadline=None, database=None)
ALPHABET = list(byte_of_character())
INTERESTING = [struct.pack("<Q", value) for value in (0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 2**40)] + [b"\xff", b"\0", b"\x80" * 4]


def base_metadata(kind: str) -> dict:
    numbers = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32, "attention.head_count": 2,
               "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0}
    arch = {"bytes": "llama", "pieces": "gemma3", "blocks": "qwen2"}[kind]
    metadata = {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in numbers.items()}}
    if kind == "pieces":
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab", "<x>"]
        more = {"model": "llama", "tokens": tokens, "scores": [-float(i) for i in range(len(tokens))],
                "token_type": [2, 3, 3] + [6] * 256 + [1] * 5 + [4], "add_space_prefix": True}
        metadata["gemma3.attention.sliding_window"] = 16
    else:
        more = {"model": "gpt2", "pre": "llama-bpe", "tokens": [*ALPHABET, "he", "ll", "hell", "<s>"], "merges": ["h e", "l l", "he ll"],
                "token_type": [1] * 259 + [3], "bos_token_id": 259, "add_eos_token": True, "eos_token_id": 259}
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in more.items()} | {"tokenizer.chat_template": "{{ messages }}"}


def base_file(kind: str, metadata: dict | None = None) -> bytes:
    """A whole model in little: a Llama of floats, a Gemma 3 of floats, or one tensor of every type of block."""
    metadata = base_metadata(kind) if metadata is None else metadata
    if kind == "blocks":
        table, data = raw_tensor("token_embd.weight", (32, 260), 0, 0), bytes(260 * 128)
        for index, block in enumerate(block for block in GGML_TYPES.values() if block.name in {**KEPT, **DENSE}):
            number = next(number for number, other in GGML_TYPES.items() if other is block)
            table += raw_tensor(f"blk.0.w{index}.weight", (block.block, 2), number, len(data))
            data += bytes(2 * block.block_bytes) + bytes(-2 * block.block_bytes % 32)
        return raw_gguf(raw_metadata(metadata), table, data, num_keys=len(metadata), num_tensors=1 + len({**KEPT, **DENSE}))
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (260, 32), "output_norm": 32, "blk.0.attn_norm": 32, "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32),
              "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_norm": 32, "blk.0.ffn_gate": (32, 32), "blk.0.ffn_up": (32, 32),
              "blk.0.ffn_down": (32, 32), "rope_freqs": 8}
    tensors = {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return raw_model(metadata, tensors | {"rope_freqs.weight": np.ones(8, np.float32)})


def odd_file(rng: random.Random, kind: str) -> bytes:
    """A file whole in its form, with one to three values of metadata that no model has, or without them."""
    metadata = base_metadata(kind)
    for key in rng.sample(sorted(metadata), rng.randint(1, 3)):
        value = metadata[key]
        odd = [0, 1, 7, 2**31 - 1, 2**32 - 1, 0.0, 1e-38, 3e38, math.nan, math.inf, -1.0, "", "x", True, [], [0], [1.5], ["a"], ["a b", "", " "]]
        if isinstance(value, list):
            odd += [value[:-1], value * 2, value[:1] * len(value), rng.sample(value, len(value)), [f"{item} " for item in value]] * 4
        metadata[key] = rng.choice(odd)
        if rng.random() < 0.2:
            del metadata[key]
    return base_file(kind, metadata)


FILES = {kind: base_file(kind) for kind in ("bytes", "pieces", "blocks")}


def use_all(path) -> None:
    """Everything that the runtime does with a file's contents before a device is asked."""
    gguf = open_gguf(path)
    for use in (config_from_gguf, tokenizer_from_gguf, _read_rows, lambda gguf: open_checkpoint(gguf.path)):
        try:
            found = use(gguf)
            if use is tokenizer_from_gguf:
                found.decode(found.encode("hello ab <x> 12 é"))
        except TpllmError as error:
            assert len(str(error)) < 5000  # noqa: PT017


def _read_rows(gguf) -> None:
    weights = GgufFormat(gguf)
    with TensorReader(1) as reader:
        for name, tensor in gguf.tensors.items():
            try:
                matrix = weights.find(name, (tensor.num_rows, tensor.shape[-1]))
                if matrix is not None:
                    matrix.open(reader)(0, min(4, matrix.shape[0]))
            except TpllmError:
                continue


def assert_safe(path, data: bytes) -> None:
    path.write_bytes(data)
    start = time.perf_counter()
    try:
        use_all(path)
    except TpllmError as error:
        assert str(path) in str(error)  # noqa: PT017
    assert time.perf_counter() - start < MAX_SECONDS


def mutated(rng: random.Random, data: bytes) -> bytes:
    """One to four changes: bytes, numbers that mean trouble, pieces cut out, doubled or swapped, the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        # Most changes in the first part: there the counts, keys and the table are.
        at = rng.randrange(min(len(changed), rng.choice([64, 600, 8000, len(changed)])) or 1)
        kind = rng.randrange(6)
        if kind == 0:
            changed[at:at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            value = rng.choice(INTERESTING)
            changed[at:at + len(value)] = value
        elif kind == 2:
            del changed[at:at + rng.randint(1, 40)]
        elif kind == 3:
            changed[at:at] = changed[at:at + rng.randint(1, 40)]
        elif kind == 4:
            changed[at:at + 1] = bytes([changed[at] ^ 1 << rng.randrange(8)]) if at < len(changed) else b""
        else:
            del changed[rng.randrange(len(changed) or 1):]
        if not changed:
            break
    return bytes(changed)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "model.gguf"


@pytest.mark.parametrize("kind", FILES)
def test_the_files_that_are_damaged_below_are_good(path, kind):
    path.write_bytes(FILES[kind])
    gguf = open_gguf(path)
    config_from_gguf(gguf)
    tokenizer_from_gguf(gguf).encode("hello")
    _read_rows(gguf)


def run(path, num_cases: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(num_cases):
        kind = rng.choice(list(FILES))
        assert_safe(path, odd_file(rng, kind) if rng.random() < 0.4 else mutated(rng, FILES[kind]))


def test_a_few_hundred_damaged_files_are_refused_or_read_in_little_memory(path):
    run(path, 5, seed=1)  # what the first use of each library takes
    tracemalloc.start()
    try:
        run(path, NUM_PLAIN, seed=0)
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_ten_thousand_damaged_files_are_refused_or_read(path, part):
    run(path, NUM_SLOW // 8, seed=100 + part + 8 * int(os.environ.get("TPLLM_FUZZ_SEED", "0")))


@SETTINGS
@given(data=st.data())
def test_any_bytes_in_the_header_are_refused_or_read(path, data):
    damaged = bytearray(FILES[data.draw(st.sampled_from(sorted(FILES)))])
    changes = st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 255))
    for position, value in data.draw(st.lists(changes, min_size=1, max_size=6)):
        damaged[position] = value
    assert_safe(path, bytes(damaged))


@SETTINGS
@given(fraction=st.floats(0, 1, exclude_max=True), kind=st.sampled_from(sorted(FILES)))
@example(fraction=0.0, kind="bytes")
def test_a_file_cut_anywhere_is_refused(path, fraction, kind):
    path.write_bytes(FILES[kind][:int(fraction * (len(FILES[kind]) - 64))])
    with pytest.raises(TpllmError, match=r"truncated|bytes are left|are left"):
        open_gguf(path)


@SETTINGS
@given(content=st.binary(max_size=300), has_magic=st.booleans())
def test_random_bytes_are_refused_or_read(path, content, has_magic):
    assert_safe(path, (b"GGUF" + struct.pack("<I", 3) if has_magic else b"") + content)
