"""Whatever is done to a file's bytes, opening and loading it ends in a CheckpointError or in the very same weights."""
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.checkpoint_files import HF_CONFIG, tensors_of, write_folder
from tpllm.checkpoint.folder import open_checkpoint
from tpllm.checkpoint.load import load_params
from tpllm.errors import CheckpointError
from tpllm.model.params import named_leaves

ONE_LAYER = {**HF_CONFIG, "num_hidden_layers": 1, "vocab_size": 16, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
SETTINGS = settings(max_examples=150, deadline=None, database=None)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(folder, the file's bytes, the header's length, the tensors, the parameters)."""
    folder, tensors = tmp_path_factory.mktemp("fuzz") / "model", tensors_of(ONE_LAYER, "BF16")
    write_folder(folder, ONE_LAYER, tensors)
    data = (folder / "model.safetensors").read_bytes()
    return folder, data, int.from_bytes(data[:8], "little"), load(folder)


def load(folder) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(folder)
    return {name: np.asarray(array) for name, array in named_leaves(load_params(checkpoint, checkpoint.config, dtype=np.float32))}


def assert_refused_or_equal(folder, data: bytes, expected: dict[str, np.ndarray]) -> None:
    (folder / "model.safetensors").write_bytes(data)
    try:
        found = load(folder)
    except CheckpointError:
        return
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@SETTINGS
@given(data=st.data())
def test_any_bytes_in_the_header_are_refused_or_change_nothing(original, data):
    folder, content, length, expected = original
    damaged = bytearray(content)
    changes = st.tuples(st.integers(0, 8 + length - 1), st.integers(0, 255))
    for position, value in data.draw(st.lists(changes, min_size=1, max_size=6)):
        damaged[position] = value
    assert_refused_or_equal(folder, bytes(damaged), expected)


@SETTINGS
@given(data=st.data())
def test_any_piece_of_the_header_cut_out_or_doubled_is_refused_or_changes_nothing(original, data):
    folder, content, length, expected = original
    start = data.draw(st.integers(8, 8 + length))
    stop = data.draw(st.integers(start, 8 + length))
    header = content[8:start] + content[start:stop] * data.draw(st.sampled_from([0, 2])) + content[stop:8 + length]
    assert_refused_or_equal(folder, len(header).to_bytes(8, "little") + header + content[8 + length:], expected)


@SETTINGS
@given(fraction=st.floats(0, 1, exclude_max=True))
@example(fraction=0.0)
def test_a_file_cut_anywhere_is_refused(original, fraction):
    folder, content, _, _ = original
    (folder / "model.safetensors").write_bytes(content[:int(fraction * len(content))])
    with pytest.raises(CheckpointError, match=r"truncated|at least 8"):
        load(folder)


@SETTINGS
@given(content=st.binary(max_size=300))
def test_random_bytes_are_refused(original, content):
    folder = original[0]
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError):
        load(folder)
