"""Finds the files of a job's ``input``: paths, globs and URLs, in their order."""
import glob
import os
from collections.abc import Sequence

import fsspec

from tpllm.errors import JobError
from tpllm.jobs.sources.files import InputFile, reading

# What fsspec needs for a protocol that its own package does not bring along.
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub",
            "abfs": "adlfs", "az": "adlfs", "sftp": "paramiko", "ssh": "paramiko", "hdfs": "pyarrow"}


def find_files(given: str | Sequence[str]) -> list[InputFile]:
    """The files of an input, in the order given; the matches of a glob in the order of their names.

    Raises:
        JobError: a path or glob without a file, a file given twice, files of several kinds, or one that cannot be read.
    """
    patterns = [given] if isinstance(given, str) else list(given)
    files = [file for pattern in patterns for file in (_find_remote if "://" in pattern else _find_local)(pattern)]
    seen: set[str] = set()
    for file in files:
        if file.location in seen:
            raise JobError(f"the input has {file.name} twice; give each file once")
        seen.add(file.location)
        if file.kind != files[0].kind:
            raise JobError(f"the input has files of two kinds: {files[0].name} is {files[0].kind} and {file.name} is {file.kind}; "
                           "make each kind its own job")
    return files


def open_filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and the path within it.

    Raises:
        JobError: an unknown protocol, or one whose package is not installed.
    """
    protocol = url.partition("://")[0].rpartition("::")[2]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        raise JobError(f"cannot open {url}: {f'{protocol}:// needs a package: pip install {package}' if package else error}") from None
    except ValueError as error:
        known = "s3, gs, hf, http, https, file, memory, abfs, sftp"
        raise JobError(f"cannot open {url}: {error}; known protocols are {known}, and what else fsspec has") from None


def _find_local(pattern: str) -> list[InputFile]:
    if os.path.lexists(pattern) or not glob.has_magic(pattern):
        return [InputFile(pattern, pattern)]
    names = sorted(name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
    if not names:
        raise JobError(f"no file matches the input {pattern} (paths are relative to the working directory, here {os.getcwd()})")
    return [InputFile(name, name) for name in names]


def _find_remote(url: str) -> list[InputFile]:
    filesystem, path = open_filesystem(url)
    if isinstance(filesystem, fsspec.implementations.local.LocalFileSystem):
        return [InputFile(f"file://{file.name}", file.name) for file in _find_local(path)]
    is_glob = "*" in path if url.startswith("http") else glob.has_magic(path)  # '?' begins the query of a web address
    with reading(url):
        if not is_glob or filesystem.exists(path):
            return [InputFile(url, path, filesystem)]
        found = filesystem.glob(path, detail=True)
    names = sorted(name for name, info in found.items() if info["type"] == "file")
    if not names:
        raise JobError(f"no file matches the input {url}")
    return [InputFile(filesystem.unstrip_protocol(name), name, filesystem) for name in names]
