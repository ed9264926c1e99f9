"""Where config.json and the weights say different things: the head, the prefix of names, biases, the dtype."""
import json
import logging

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.checkpoint_files import HF_CONFIG, tensors_of, write_folder
from tpllm.checkpoint.entries import find_entries
from tpllm.checkpoint.folder import open_checkpoint
from tpllm.checkpoint.load import load_params
from tpllm.checkpoint.save import quantize_checkpoint
from tpllm.errors import CheckpointError
from tpllm.loading import stored_dtype
from tpllm.model.params import named_leaves

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load(folder):
    checkpoint = open_checkpoint(folder)
    return {name: np.asarray(array) for name, array in named_leaves(load_params(checkpoint, checkpoint.config, dtype=np.float32))}


def write(folder, tensors, **changes):
    write_folder(folder, {**HF_CONFIG, **changes}, tensors)
    return folder


@pytest.fixture
def tensors():
    return tensors_of(HF_CONFIG)


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="tpllm")
    return lambda: [record.getMessage() for record in caplog.records]


def test_another_head_of_a_tied_model_is_kept_and_saved_with_it(tmp_path, tensors, said):
    folder = write(tmp_path / "tied", tensors, tie_word_embeddings=True)
    params = load(folder)
    np.testing.assert_array_equal(params["head"], tensors[HEAD])
    assert "holds another lm_head.weight" in said()[0]
    saved = quantize_checkpoint(folder, tmp_path / "saved", "int8")
    assert not json.loads((saved / "config.json").read_text())["tie_word_embeddings"]
    np.testing.assert_array_equal(load(saved)["head"], tensors[HEAD])


def test_a_head_that_differs_in_its_last_value_is_another_one(tmp_path, tensors):
    other = tensors[EMBED].copy()
    other[-1, -1] += 1
    assert "head" in load(write(tmp_path / "last", {**tensors, HEAD: other}, tie_word_embeddings=True))
    assert "head" not in load(write(tmp_path / "same", {**tensors, HEAD: tensors[EMBED].copy()}, tie_word_embeddings=True))


def test_a_tied_model_that_holds_only_the_head_loads(tmp_path, tensors, said):
    folder = write(tmp_path / "head", {name: value for name, value in tensors.items() if name != EMBED}, tie_word_embeddings=True)
    params = load(folder)
    np.testing.assert_array_equal(params["embed"], tensors[HEAD])
    assert "head" not in params
    assert len(said()) == 1


def test_an_untied_model_without_a_head_is_tied_with_a_warning(tmp_path, tensors, said):
    params = load(write(tmp_path / "none", {name: value for name, value in tensors.items() if name != HEAD}))
    assert "head" not in params
    (message,) = said()
    assert "'lm_head.weight' is missing" in message
    assert "the embedding is used" in message


def test_a_head_under_a_damaged_name_is_missing_and_no_embedding_stands_in_for_it(tmp_path, tensors):
    renamed = {name.replace("lm_head", "lm_heae"): value for name, value in tensors.items()}
    checkpoint = open_checkpoint(write(tmp_path / "damaged", renamed))
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' of shape \(67, 24\) is missing"):
        find_entries(checkpoint, checkpoint.config)


def test_weights_without_the_prefix_of_a_model_with_a_head_load(tmp_path, tensors, said):
    plain = {name.removeprefix("model."): value for name, value in tensors.items() if name != HEAD}
    folder = write(tmp_path / "plain", plain, architectures=["Qwen2Model"], model_type="qwen2", tie_word_embeddings=True)
    params, expected = load(folder), load(write(tmp_path / "usual", tensors))
    assert params.keys() == expected.keys() - {"head"}
    for name, value in params.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert "'model.'" in said()[0]


def test_biases_that_no_layer_has_are_zero_with_one_warning(tmp_path, tensors, said):
    params = load(write(tmp_path / "none", {name: value for name, value in tensors.items() if not name.endswith(".bias")}))
    assert not any(params[f"layers.{layer}.attn.{part}_bias"].any() for layer in range(2) for part in "qkv")
    (message,) = said()
    assert "attn.k_bias, attn.q_bias, attn.v_bias" in message
    assert "zero" in message


def test_a_bias_that_one_layer_lacks_or_that_is_there_under_another_name_is_missing(tmp_path, tensors):
    one = {name: value for name, value in tensors.items() if name != "model.layers.1.self_attn.q_proj.bias"}
    renamed = {name.replace("q_proj.bias", "q_proj.biat"): value for name, value in tensors.items()}
    for number, damaged in enumerate((one, renamed)):
        checkpoint = open_checkpoint(write(tmp_path / str(number), damaged))
        with pytest.raises(CheckpointError, match=r"self_attn.q_proj.bias' of shape \(48,\) is missing"):
            find_entries(checkpoint, checkpoint.config)


@pytest.mark.parametrize(("hf_config", "dtype"), [
    ({"dtype": "float16"}, "float16"), ({"torch_dtype": "float32"}, "float32"), ({"dtype": "torch.float16"}, "float16"),
    ({"dtype": "half"}, "float16"), ({}, "bfloat16"),
    ({"dtype": None, "torch_dtype": None}, "bfloat16"), ({"dtype": None, "torch_dtype": "float32"}, "float32")])
def test_the_dtype_is_that_of_config_json_or_else_of_the_weights(tmp_path, hf_config, dtype, said):
    tensors = open_checkpoint(write(tmp_path / "bf16", tensors_of(HF_CONFIG, "BF16"))).tensors
    assert stored_dtype(hf_config, tensors) == dtype
    assert said() == []


@pytest.mark.parametrize(("name", "dtype"), [("float64", "float32"), ("double", "float32"), ("float8_e4m3fn", "float16"), ("int8", "float16"),
                                             ("auto", "float16"), ("nonsense\n", "float16"), (16, "float16"), ({"a": 1}, "float16")])
def test_a_dtype_that_is_not_computed_in_is_replaced_with_a_line_in_the_log(tmp_path, name, dtype, said):
    tensors = tensors_of(HF_CONFIG, "F16") | {"model.norm.weight": np.ones(24, np.float32)}
    assert stored_dtype({"dtype": name}, open_checkpoint(write(tmp_path / "f16", tensors)).tensors) == dtype
    (message,) = said()
    assert repr(name) in message
    assert f"computed in {dtype}" in message
    assert stored_dtype({"dtype": "int8"}) == "bfloat16"  # a folder without weights


def test_metadata_that_is_null_is_none(tmp_path, tensors):
    folder = write(tmp_path / "null", tensors)
    save_file(tensors, folder / "model.safetensors")
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = b'{"__metadata__":null,' + data[9:8 + length].rstrip()
    header += b" " * (-len(header) % 8)
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length:])
    assert open_checkpoint(folder).tensors.keys() == tensors.keys()
