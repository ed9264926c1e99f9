"""Opening folders: what is found, what is refused, and which paths are followed."""
import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from tpllm.checkpoint.entries import find_entries
from tpllm.checkpoint.folder import open_checkpoint
from tpllm.errors import CheckpointError, ConfigError

INDEX = "model.safetensors.index.json"


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_demo_opens_from_inside_the_package():
    checkpoint = open_checkpoint("demo")
    assert checkpoint.family.name == "Llama"
    assert checkpoint.revision is None
    assert checkpoint.config.hidden_size == checkpoint.hf_config["hidden_size"]
    assert checkpoint.generation_config
    assert all(entry.dtype == "BF16" for entry in checkpoint.tensors.values())


@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_tensor_of_one_or_many_files_is_found(make_checkpoint, num_shards):
    folder, tensors = make_checkpoint("BF16", num_shards=num_shards)
    checkpoint = open_checkpoint(str(folder))
    assert {name: entry.shape for name, entry in checkpoint.tensors.items()} == {name: value.shape for name, value in tensors.items()}
    assert len(checkpoint.headers) == num_shards
    assert checkpoint.config.num_kv_heads == 2
    assert checkpoint.generation_config == {}


def test_shards_without_an_index_are_all_read(make_checkpoint):
    folder, tensors = make_checkpoint(num_shards=3)
    (folder / INDEX).unlink()
    assert open_checkpoint(folder).tensors.keys() == tensors.keys()


@pytest.mark.parametrize("has_index", [True, False])
def test_a_missing_shard_is_named(make_checkpoint, has_index):
    folder, _ = make_checkpoint(num_shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    if not has_index:
        (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"'model-00002-of-00003.safetensors' is missing"):
        open_checkpoint(folder)


def test_a_tensor_that_two_files_hold_is_refused_without_an_index(make_checkpoint):
    folder, _ = make_checkpoint(num_shards=2)
    (folder / INDEX).unlink()
    save_file({"model.norm.weight": np.zeros(24, np.float32)}, folder / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor 'model.norm.weight' is both in .* and in other.safetensors"):
        open_checkpoint(folder)


def test_a_weight_map_may_name_what_nothing_needs_and_put_a_tensor_into_the_wrong_file(make_checkpoint):
    folder, tensors = make_checkpoint(num_shards=2)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    first, second = sorted(set(weight_map.values()))
    moved, forgotten = (name for name, file in list(weight_map.items())[:4] if file == second)
    weight_map[moved] = first
    del weight_map[forgotten]
    edit_json(folder / INDEX, weight_map={**weight_map, "ghost": first, "lm_head.bias": second})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors.keys() == tensors.keys()
    assert checkpoint.tensors[moved].path.name == second


def test_a_tensor_that_only_the_weight_map_has_is_missing_where_it_is_needed(make_checkpoint):
    folder, tensors = make_checkpoint(num_shards=2)
    save_file({name: tensors[name] for name in tensors if name != "model.norm.weight"}, folder / "model-00001-of-00002.safetensors")
    save_file({"model.other": np.zeros(2, np.float32)}, folder / "model-00002-of-00002.safetensors")
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' of shape \(24,\) is missing; download"):
        find_entries(checkpoint, checkpoint.config)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 3}, "text"])
def test_a_weight_map_that_is_no_map_is_refused(make_checkpoint, weight_map):
    folder, _ = make_checkpoint(num_shards=2)
    edit_json(folder / INDEX, weight_map=weight_map)
    with pytest.raises(CheckpointError, match="weight_map must map"):
        open_checkpoint(folder)


@pytest.mark.parametrize("path", ["/etc/passwd", "../other.safetensors", "sub/../../other.safetensors", "", "a\0b"])
def test_a_weight_map_path_that_leaves_the_folder_is_refused(make_checkpoint, path):
    folder, _ = make_checkpoint(num_shards=2)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder.parent / "other.safetensors")
    edit_json(folder / INDEX, weight_map={"model.norm.weight": path})
    with pytest.raises(CheckpointError, match="leaves the checkpoint's folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("path", ["\ud800", "x" * 5000, "no/such/file.safetensors"])
def test_a_weight_map_path_that_cannot_exist_is_missing(make_checkpoint, path):
    folder, _ = make_checkpoint(num_shards=2)
    edit_json(folder / INDEX, weight_map={"model.norm.weight": path})
    with pytest.raises(CheckpointError, match="is missing"):
        open_checkpoint(folder)


def test_links_are_followed_inside_the_folder_and_not_out_of_it(make_checkpoint):
    folder, tensors = make_checkpoint()
    weights = folder / "model.safetensors"
    (folder / "sub").mkdir()
    weights.rename(folder / "sub" / "w")
    weights.symlink_to("sub/w")
    assert open_checkpoint(folder).tensors.keys() == tensors.keys()
    (folder / "sub" / "w").rename(folder.parent / "w")
    weights.unlink()
    weights.symlink_to(folder.parent / "w")
    with pytest.raises(CheckpointError, match=r"'model.safetensors' is a link out of the checkpoint's folder"):
        open_checkpoint(folder)


def test_a_folder_between_that_is_a_link_out_is_not_followed(make_checkpoint):
    folder, _ = make_checkpoint(num_shards=2)
    (folder.parent / "elsewhere").mkdir()
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder.parent / "elsewhere" / "a.safetensors")
    (folder / "sub").symlink_to(folder.parent / "elsewhere")
    edit_json(folder / INDEX, weight_map={"model.norm.weight": "sub/a.safetensors"})
    with pytest.raises(CheckpointError, match="is a link out of the checkpoint's folder"):
        open_checkpoint(folder)


def test_a_pipe_in_place_of_a_weight_file_is_refused(make_checkpoint):
    folder, _ = make_checkpoint()
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        open_checkpoint(folder)


@pytest.mark.parametrize(("file", "message"), [
    ("pytorch_model.bin", "is a pickle.*save_pretrained"), ("model.pt", "is a pickle"), ("consolidated.00.pth", "is a pickle"),
    ("model.ckpt", "is a pickle"), ("model.gguf", "but 'model.gguf'; to open that, give the path"), ("readme.txt", r"holds no \*.safetensors"),
])
def test_other_weight_formats_are_refused_with_what_to_do(make_checkpoint, file, message):
    folder, _ = make_checkpoint()
    (folder / "model.safetensors").rename(folder / file)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(("model", "message"), [
    ("no-such-folder", "there is no such folder or file; give a folder, a GGUF file, a hub id 'owner/name', or 'demo'"),
    ("x/model.gguf", "there is no such folder or file; give a folder, a GGUF file"), ("", "no such folder|config.json"),
    ("/no/such/folder", "no such folder"), ("x" * 5000, "no such folder"),
    ("~nobody/model", "no such folder"),
])
def test_a_model_that_is_not_there_is_an_error_of_one_line(model, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("model", "near"), [("my-modle", "my-model"), ("./sub/tiny.Q4.guf", "sub/tiny.Q4.gguf"), ("dmo", "demo"),
                                             ("smol2", "smollm2")])
def test_a_misspelled_model_is_answered_with_the_nearest_name_and_the_nearest_folder_or_gguf_file(model, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("my-model", "sub"):
        (tmp_path / folder).mkdir()
    for file in ("sub/tiny.Q4.gguf", "my-modle.txt"):
        (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=rf"did you mean '{near}'\?"):
        open_checkpoint(model)


def test_a_file_in_place_of_a_folder_is_refused(make_checkpoint):
    folder, _ = make_checkpoint()
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        open_checkpoint(folder / "model.safetensors")


def test_a_revision_of_a_folder_is_refused(make_checkpoint):
    folder, _ = make_checkpoint()
    with pytest.raises(CheckpointError, match=r"revision 'main' is given for .* which is not a hub id"):
        open_checkpoint(folder, revision="main")


@pytest.mark.parametrize(("text", "message"), [(None, "holds no config.json"), ("{", "config.json: not valid JSON"), ("[1]", "must be an object"),
                                               ("\xff", "config.json: not valid JSON"), ('{"a": 1, "a": 2}', "'a' is there twice"),
                                               ('{"a":' * 101 + "1" + "}" * 101, "more than 100 deep"), ('{"a":' + "[" * 10**5, "not valid JSON"),
                                               ('{"a":' + "[" * 10**5 + "]" * 10**5 + "}", "not valid JSON|more than 100"),
                                               ('{"a":' + "9" * 5000 + "}", "not valid JSON")])
def test_a_bad_config_is_refused(make_checkpoint, text, message):
    folder, _ = make_checkpoint()
    if text is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_code_in_a_checkpoint_is_never_run(make_checkpoint):
    folder, _ = make_checkpoint(auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    assert open_checkpoint(folder).family.name == "Qwen2"
    edit_json(folder / "config.json", architectures=["EvilForCausalLM"])
    with pytest.raises(CheckpointError, match=r"its own code \(auto_map\), which is never run.*EvilForCausalLM; known: LlamaForCausalLM"):
        open_checkpoint(folder)
    assert not (folder / "ran").exists()


def test_an_unknown_architecture_lists_those_known(make_checkpoint):
    folder, _ = make_checkpoint()
    edit_json(folder / "config.json", architectures=["OtherForCausalLM"])
    with pytest.raises(ConfigError, match="OtherForCausalLM; known: LlamaForCausalLM"):
        open_checkpoint(folder)


@pytest.mark.parametrize("changes", [{"rope_scaling": "long"}, {"rms_norm_eps": "small"}, {"architectures": 3}, {"rope_theta": []},
                                     {"rope_scaling": {"rope_type": []}}, {"hidden_act": {}}, {"num_key_value_heads": "2"}])
def test_a_config_field_of_the_wrong_type_is_refused(make_checkpoint, changes):
    folder, _ = make_checkpoint()
    edit_json(folder / "config.json", **changes)
    with pytest.raises((CheckpointError, ConfigError), match=r"config.json: "):
        open_checkpoint(folder)


def test_the_fingerprint_follows_the_content_and_not_the_place(make_checkpoint, tmp_path):
    folder, tensors = make_checkpoint(num_shards=2)
    first = open_checkpoint(folder).fingerprint()
    shutil.copytree(folder, tmp_path / "copy")
    copy = open_checkpoint(tmp_path / "copy").fingerprint()
    assert json.loads(json.dumps(copy)) == first
    edit_json(tmp_path / "copy" / "config.json", rms_norm_eps=1e-5)
    assert open_checkpoint(tmp_path / "copy").fingerprint() != first
    name = "model.norm.weight"
    file = json.loads((folder / INDEX).read_text())["weight_map"][name]
    entry = open_checkpoint(folder).tensors[name]
    with open(folder / file, "r+b") as weights:
        weights.seek(entry.start)
        weights.write((tensors[name] + 1).tobytes())
    assert open_checkpoint(folder).fingerprint() != first
