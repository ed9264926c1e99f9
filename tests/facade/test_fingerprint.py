"""A model's fingerprint tells of every file that is read to make it: what loads it is watched, so that no list of names has to be right."""
import contextlib
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest

from tests.support.checkpoint_files import HF_CONFIG, tensors_of
from tests.support.checkpoint_files import write_folder as write_checkpoint
from tests.support.damaged_models import gguf_file
from tests.tokenizer import tokenizer_folders
from tpllm.checkpoint.safetensors import read_header, sample_digest
from tpllm.errors import TpllmError
from tpllm.loading import open_model
from tpllm.tokenizer import Tokenizer

FILES = {
    "generation_config.json": '{"temperature": 0.5}', "special_tokens_map.json": "{}", "added_tokens.json": "{}",
    "chat_template.jinja": "{{ messages[0].content }}", "chat_template.json": '{"chat_template": "other"}',
    "additional_chat_templates/tool_use.jinja": "{{ tools | length }}", "additional_chat_templates/rag.jinja": "{{ documents }}",
}
NOT_READ = {"README.md": "a model", "trainer_state.json": "{}", "notes/x.json": "{}", "original/params.json": "{}"}
opened: list[str] | None = None


def watch(event: str, arguments: tuple) -> None:
    if opened is not None and event == "open" and isinstance(arguments[0], str | pathlib.Path):
        opened.append(str(arguments[0]))


@contextlib.contextmanager
def watched():
    """Whatever Python opens in the block."""
    global opened
    if watch not in hooks:
        sys.addaudithook(watch)  # which cannot be taken away again
        hooks.append(watch)
    opened = []
    try:
        yield opened
    finally:
        opened = None


hooks: list = []


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    write_checkpoint(path, HF_CONFIG, tensors_of(HF_CONFIG, "F32"), num_shards=2)
    tokenizer_folders.write_folder(path, tokenizer_folders.chatml_like(), tokenizer_config={})
    for name, text in {**FILES, **NOT_READ}.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    return path


def fingerprint(path):
    return open_model(str(path), "tp=1").checkpoint.fingerprint()


def test_every_file_that_is_opened_is_in_the_fingerprint_and_no_other(folder):
    with watched() as seen:
        found = fingerprint(folder)
    names = {str(pathlib.Path(name).resolve().relative_to(folder.resolve())) for name in seen if pathlib.Path(name).is_relative_to(folder)}
    assert names == {*found["files"], *found["weights"]}
    always = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"}
    assert always | FILES.keys() - {"chat_template.json"} <= found["files"].keys()
    assert not {*NOT_READ} & {*found["files"]}


def test_a_change_of_any_of_them_changes_the_fingerprint_also_one_that_comes_or_goes(folder, tmp_path):
    first = fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert json.loads(json.dumps(fingerprint(tmp_path / "copy"))) == first
    for name in [*first["files"], "additional_chat_templates/new.jinja"]:
        path = folder / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(b" " + (before or b"x"))
        assert fingerprint(folder) != first, name
        path.unlink() if before is None else path.write_bytes(before)
    for name in ("chat_template.jinja", "generation_config.json", "special_tokens_map.json", "additional_chat_templates/rag.jinja"):
        path = folder / name
        before = path.read_bytes()
        path.unlink()
        assert fingerprint(folder) != first, name
        path.write_bytes(before)
    for name in NOT_READ:
        (folder / name).write_text("something else")
    assert fingerprint(folder) == first


def test_any_byte_of_small_weights_counts_and_of_large_ones_every_tensor(folder, tmp_path, monkeypatch):
    first, path = fingerprint(folder), next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    for place in (len(data) - 1, len(data) - len(data) // 3, len(data) - len(data) // 7):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert fingerprint(folder)["weights"] != first["weights"]
    path.write_bytes(data)
    monkeypatch.setattr("tpllm.checkpoint.safetensors.WHOLE_BYTES", 100)
    monkeypatch.setattr("tpllm.checkpoint.safetensors.SAMPLE_BYTES", 4)
    header = read_header(path)
    whole = sample_digest(header)
    for tensor in header.tensors.values():
        changed = np.frombuffer(bytes(data), np.uint8).copy()
        changed[tensor.start:tensor.stop] ^= 1
        path.write_bytes(changed.tobytes())
        assert sample_digest(header) != whole, tensor.name


def test_a_file_that_changes_between_two_reads_is_refused(folder, monkeypatch):
    real = Tokenizer.from_folder

    def later(path):
        (folder / "config.json").write_text(json.dumps({**HF_CONFIG, "rms_norm_eps": 0.5}))
        return real(path)
    monkeypatch.setattr(Tokenizer, "from_folder", later)
    with pytest.raises(TpllmError, match=r"config.json changed while the model was loaded; load it again"):
        open_model(str(folder), "tp=1")


def test_a_gguf_file_is_its_own_fingerprint(tmp_path):
    data, length = gguf_file("llama")
    (tmp_path / "config.json").write_text("{}")  # beside it, and not read
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with watched() as seen:
        first = fingerprint(path)
    assert {name for name in seen if pathlib.Path(name).is_relative_to(tmp_path)} == {str(path)}
    assert (first["files"], first["weights"].keys()) == ({}, {"model.gguf"})
    for place in (length - 40, len(data) - 1):  # the table of tensors, the last weight
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        with contextlib.suppress(TpllmError):
            assert fingerprint(path) != first
