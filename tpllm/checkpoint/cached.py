"""The models that are on this machine by a name: those inside tpllm, fetched ones, and the hub's cache."""
import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tpllm.checkpoint.packaged import PACKAGED, packaged_path
from tpllm.checkpoint.source import BUNDLED
from tpllm.errors import CheckpointError, did_you_mean


@dataclasses.dataclass(frozen=True)
class CachedModel:
    """A model that needs no download.

    Attributes:
        name: as commands take it.
        kind: ``"bundled"``, ``"fetched"`` or ``"hub"``.
        formats: of its weights, such as ``"GGUF"``.
        num_bytes: on disk.
        folder: where it lies.
    """

    name: str
    kind: str
    formats: str
    num_bytes: int
    folder: Path


def cached_models() -> list[CachedModel]:
    """All of them: bundled ones, fetched ones, and the hub's by name."""
    found = [CachedModel(name, "bundled", "safetensors", sum(path.stat().st_size for path in folder.iterdir()), folder)
             for name, folder in BUNDLED.items()]
    for name in PACKAGED:
        path = packaged_path(name)
        if path is not None and path.is_file():
            found.append(CachedModel(name, "fetched", "GGUF", path.stat().st_size, path.parent))
    return found + sorted((_describe(repo) for _, repo in _hub_repos()), key=lambda model: model.name)


def remove_model(name: str) -> int:
    """Delete a fetched model, or all revisions of a hub's model in the cache.

    Returns:
        The bytes that were freed.

    Raises:
        CheckpointError: a name that is not among the models, or that of a bundled one.
    """
    known = {model.name: model for model in cached_models()}
    if name not in known:
        raise CheckpointError(f"model {name!r} is not on this machine; {did_you_mean(name, known)}see 'tpllm list'")
    if name in BUNDLED:
        raise CheckpointError(f"model {name!r} is a part of tpllm and cannot be removed")
    if known[name].kind == "fetched":
        shutil.rmtree(known[name].folder)
        return known[name].num_bytes
    freed = 0
    for cache, repo in list(_hub_repos()):
        if repo.repo_id == name:
            strategy = cache.delete_revisions(*(revision.commit_hash for revision in repo.revisions))
            freed += strategy.expected_freed_size
            strategy.execute()
    return freed


def _hub_repos() -> Iterator[tuple[Any, Any]]:
    """(the hub's cache, a repository of a model in it)."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir  # imported here: it takes longer than all else at import
    with contextlib.suppress(CacheNotFound):
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
        yield from ((cache, repo) for repo in cache.repos if repo.repo_type == "model")


def _describe(repo: Any) -> CachedModel:
    suffixes = {Path(file.file_name).suffix for revision in repo.revisions for file in revision.files}
    formats = [name for name, suffix in (("safetensors", ".safetensors"), ("GGUF", ".gguf")) if suffix in suffixes]
    return CachedModel(repo.repo_id, "hub", ", ".join(formats) or "no weights", repo.size_on_disk, repo.repo_path)
