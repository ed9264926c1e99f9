"""An output that is a URL: the job runs in a local folder, which has what durability needs (locks, appends, syncs), and every file that is
committed there is then copied to the remote folder.

Both folders are brought to agree when a job begins, so that a copy which failed, or a machine which is gone, costs only the parts that were not
committed. A remote folder is not locked: it is for one process at a time.
"""
import contextlib
import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from tpllm.environment.compile_cache import cache_folder
from tpllm.errors import JobError
from tpllm.jobs.config import JobConfig
from tpllm.jobs.manifest import describe, differences, is_environment, parse_manifest
from tpllm.jobs.outputs.durable import CHUNK_BYTES, Disk, write_whole, writing_to
from tpllm.jobs.outputs.folder import MANIFEST, read_manifest
from tpllm.jobs.outputs.part_files import ERRORS_NAME, PART_NAME, errors_name
from tpllm.jobs.outputs.part_records import PARTS, read_records
from tpllm.jobs.sources.find import open_filesystem

# Where an object is replaced at once or not at all; elsewhere it is written under another name and moved.
ATOMIC_PROTOCOLS = frozenset(("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hf", "memory"))


def output_place(job: JobConfig) -> tuple[pathlib.Path, "RemoteFolder | None"]:
    """Where a job writes: a local folder, and the remote one that gets a copy.

    Raises:
        JobError: a URL whose protocol is unknown or needs a package that is not installed.
    """
    if "://" not in job.folder:
        return pathlib.Path(job.folder), None
    remote = RemoteFolder(job.folder)
    if job.work_dir is not None:
        return pathlib.Path(job.work_dir, job.own_shard.folder_name if job.shard is not None else ""), remote
    cache = cache_folder()
    if cache is None:
        raise JobError(f"the output {job.folder} needs a local working folder, and TPLLM_CACHE_DIR is off; set work_dir")
    return cache / "jobs" / hashlib.sha256(job.folder.rstrip("/").encode()).hexdigest()[:16], remote


class RemoteFolder:
    """A folder behind a URL."""

    def __init__(self, url: str):
        self._url = url.rstrip("/")
        self._filesystem, self._path = open_filesystem(self._url)
        protocols = self._filesystem.protocol
        self._is_atomic = not ATOMIC_PROTOCOLS.isdisjoint((protocols,) if isinstance(protocols, str) else protocols)

    def agree(self, folder: pathlib.Path, disk: Disk) -> None:
        """Copy to each of the two folders what only the other has.

        Raises:
            JobError: they belong to different jobs, or one of them cannot be read or written.
        """
        with _reaching(self._url, folder):
            self._filesystem.invalidate_cache()
            remote = self._sizes()
            manifest = self._manifest() if MANIFEST in remote else None
        local_manifest = read_manifest(folder)
        if any(map(PART_NAME.fullmatch, remote)) and manifest is None and local_manifest is None:
            raise JobError(f"the output folder {self._url} holds parts of a job but no {MANIFEST}; give this job another output")
        if manifest is not None and (local_manifest is None or _is_later(manifest, local_manifest, self._url, folder)):
            self._download(MANIFEST, folder, disk)
        elif local_manifest is not None and local_manifest != manifest:
            self.upload(folder / MANIFEST)
        local = {path.name: path.stat().st_size for path in folder.iterdir()}
        records = read_records(folder, read_manifest(folder))
        recorded = {name: file.num_bytes for files in records.values() for name, file in files.items()}
        left_over = {errors_name(part) for part in records} - recorded.keys()  # of rows that failed, and were retried since
        for name in sorted(filter(_is_committed_file, {*local, *remote}), key=_errors_first):
            if name in left_over:
                self._remove(name, folder, disk)
            elif local.get(name) != remote.get(name):
                self._bring_together(name, folder, disk, sizes=(local.get(name), remote.get(name), recorded.get(name)))

    def _bring_together(self, name: str, folder: pathlib.Path, disk: Disk, *, sizes: tuple[int | None, int | None, int | None]) -> None:
        """Of one file that differs in size or is there only once: copy the one that is as long as the manifest says; where it says nothing, the local
        one if there is one.

        Args:
            name: the file.
            folder: the local one.
            disk: how to write there.
            sizes: here, there, and in the manifest, each None where there is none.

        Raises:
            JobError: neither is as long.
        """
        local, remote, recorded = sizes
        if local is not None and recorded in (None, local):
            self.upload(folder / name)
        elif remote is not None and recorded in (None, remote):
            self._download(name, folder, disk)
        else:
            where = f"{folder / name} has {local} bytes" if local is not None else f"{self._url}/{name} has {remote} bytes"
            raise JobError(f"{where} and should have {recorded}, as the manifest says: it was cut, emptied or replaced after it was committed; "
                           f"copy it again, or remove it, also from {self._url}, and run the job again, which computes its rows again")

    def upload(self, path: pathlib.Path) -> None:
        """Copy a local file, whole.

        Raises:
            JobError: the remote folder cannot be written.
        """
        target = f"{self._path}/{path.name}"
        with _reaching(self._url, path.parent):
            if self._is_atomic:
                self._filesystem.put_file(os.fspath(path), target)
            else:
                self._filesystem.makedirs(self._path, exist_ok=True)
                self._filesystem.put_file(os.fspath(path), f"{target}.tmp")
                self._filesystem.mv(f"{target}.tmp", target)

    def _download(self, name: str, folder: pathlib.Path, disk: Disk) -> None:
        with _reaching(self._url, folder), self._filesystem.open(f"{self._path}/{name}", "rb") as file, writing_to(folder):
            write_whole(disk, folder / name, iter(lambda: file.read(CHUNK_BYTES), b""))

    def _remove(self, name: str, folder: pathlib.Path, disk: Disk) -> None:
        with _reaching(self._url, folder), contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(f"{self._path}/{name}")
        with writing_to(folder):
            disk.remove(folder / name)

    def _sizes(self) -> dict[str, int]:
        """The files there and their sizes; none where there is no folder."""
        try:
            entries = self._filesystem.ls(self._path, detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}

    def _manifest(self) -> dict[str, Any]:
        return parse_manifest(self._filesystem.cat_file(f"{self._path}/{MANIFEST}"), f"{self._url}/{MANIFEST}")


@contextlib.contextmanager
def _reaching(url: str, folder: pathlib.Path) -> Iterator[None]:
    """Turn whatever goes wrong over there into a :class:`JobError`: each kind of storage has errors of its own."""
    try:
        yield
    except (JobError, MemoryError, AssertionError):
        raise
    except Exception as error:
        raise JobError(f"cannot copy to or from the output {url}: {getattr(error, 'strerror', None) or error or type(error).__name__}; what is "
                       f"committed is kept in {folder}: run the job again to go on") from error


def _is_later(remote: Mapping[str, Any], local: Mapping[str, Any], url: str, folder: pathlib.Path) -> bool:
    """Whether the remote manifest tells of runs that the local one does not know."""
    changes = [change for change in differences(local, remote)
               if not is_environment(change[0]) and change[0].partition(".")[0] not in ("environment_changes", PARTS)]
    if changes:
        different = describe(changes, "{key} is {new} there and {old} here")
        raise JobError(f"the output {url} and its working folder {folder} belong to different jobs: {different}; give this job another "
                       "output or work_dir, or remove the one that is not wanted")
    def history(manifest: Mapping[str, Any]) -> tuple[int, bool]:
        return len(manifest.get("environment_changes", ())), PARTS in manifest
    return history(remote) > history(local)


def _is_committed_file(name: str) -> bool:
    return bool(PART_NAME.fullmatch(name) or ERRORS_NAME.fullmatch(name))


def _errors_first(name: str) -> tuple[str, bool]:
    """A part's own file tells that the part is committed, so it comes last."""
    return name.partition(".")[0], not ERRORS_NAME.fullmatch(name)
