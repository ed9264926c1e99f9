"""One file of a job's input, local or remote: opened, decompressed, hashed, and watched for change."""
import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import os
import pathlib
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import fsspec
from fsspec.asyn import AsyncFileSystem

from tpllm.errors import JobError, TpllmError

JSONL, PARQUET = "jsonl", "parquet"
PARQUET_SUFFIXES = (".parquet", ".pq")
OTHER_SUFFIXES = (".csv", ".tsv", ".zip", ".tar", ".tgz", ".lz4", ".7z", ".arrow", ".feather", ".orc", ".avro", ".xlsx")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
# What may tell two versions of a remote file apart; each kind of storage has some of them.
STAMP_KEYS = ("size", "mtime", "created", "updated", "generation", "crc32c", "md5Hash", "ETag", "etag", "LastModified", "last_modified",
              "Last-Modified", "Content-MD5", "VersionId", "blob_id")
BUFFER_BYTES = 1 << 20


class InputFile:
    """One file as it is when this is made.

    Args:
        name: how errors call it: the path or URL as given or found.
        path: where it is, as ``filesystem`` takes it.
        filesystem: where it is remote; None for a local file.

    Attributes:
        kind: ``"jsonl"`` or ``"parquet"``, by the name.

    Raises:
        JobError: a kind that is not supported, or a file that cannot be read.
    """

    def __init__(self, name: str, path: str, filesystem: fsspec.AbstractFileSystem | None = None):
        self.name, self._path, self._filesystem = name, path, filesystem
        suffixes = _suffixes(name)
        is_compressed = suffixes[-1] in COMPRESSED_SUFFIXES
        self.kind = PARQUET if suffixes[-1] in PARQUET_SUFFIXES else JSONL
        if any(suffix in OTHER_SUFFIXES + PARQUET_SUFFIXES * is_compressed for suffix in suffixes[-1 - is_compressed:]):
            raise JobError(f"cannot read the input {name}: it must be JSONL (also .gz, .bz2, .xz or .zst) or Parquet (which compresses inside)")
        self._decompress = _decompressor(suffixes[-1], name) if is_compressed else None
        with reading(name, hint=f" (paths are relative to the working directory, here {pathlib.Path.cwd()})" if filesystem is None else ""):
            self._stamp = self._stat()
            self.open().close()

    def open(self) -> BinaryIO:
        """The bytes as they are stored."""
        if self._filesystem is None:
            return open(self._path, "rb")
        # Parquet is read in ranges of its own; to read ahead of each would fetch most of the file several times.
        is_ranged = self.kind == PARQUET and isinstance(self._filesystem, AsyncFileSystem)
        return self._filesystem.open(self._path, "rb", **({"cache_type": "none"} if is_ranged else {}))

    @property
    def location(self) -> str:
        """What two names of one file have in common."""
        return os.path.realpath(self._path) if self._filesystem is None else self._filesystem.unstrip_protocol(self._path)

    @contextlib.contextmanager
    def opened(self, digest: "Digest | None" = None) -> Iterator[BinaryIO]:
        """The content, decompressed. ``digest`` learns every stored byte, if the block comes to its end.

        Raises:
            JobError: a file that cannot be read or decompressed.
        """
        with reading(self.name), contextlib.closing(self.open()) as file:
            stored: BinaryIO = io.BufferedReader(_Followed(file, digest), BUFFER_BYTES)
            with contextlib.closing(self._decompress(stored) if self._decompress else stored) as content:
                yield content
                if digest is not None:
                    while stored.read(BUFFER_BYTES):  # what a decompressor leaves unread after its last stream
                        pass

    def check_unchanged(self) -> None:
        """Make sure that the file is still what it was.

        Raises:
            JobError: it is not.
        """
        with reading(self.name):
            if self._stat() != self._stamp:
                raise JobError(f"the input {self.name} changed while the job ran; what is written belongs to the old content: "
                               "restore it to go on, or give the new content another output")

    def _stat(self) -> tuple[Any, ...]:
        if self._filesystem is None:
            stat = os.stat(self._path)
            return stat.st_ino, stat.st_size, stat.st_mtime_ns
        self._filesystem.invalidate_cache()
        info = self._filesystem.info(self._path)
        if info.get("type") == "directory":
            raise IsADirectoryError("Is a directory")
        return tuple(str(info.get(key)) for key in STAMP_KEYS)


class Digest:
    """The SHA-256 and the length of a file's bytes."""

    def __init__(self):
        self.num_bytes, self._sha256 = 0, hashlib.sha256()

    def update(self, data: memoryview) -> None:
        """Take in the next bytes."""
        self.num_bytes += len(data)
        self._sha256.update(data)

    def hexdigest(self) -> str:
        """The SHA-256 in hex."""
        return self._sha256.hexdigest()


class _Followed(io.RawIOBase):
    """A file read from its beginning to its end, with a digest that follows."""

    def __init__(self, file: BinaryIO, digest: Digest | None):
        self._file, self._digest = file, digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[:len(data)] = data
        if self._digest is not None:
            self._digest.update(data)
        return len(data)


@contextlib.contextmanager
def reading(name: str, *, hint: str = "") -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into a :class:`JobError`: each kind of storage and compression has errors of its own."""
    try:
        yield
    except (TpllmError, MemoryError, AssertionError):
        raise
    except IsADirectoryError:
        raise JobError(f"cannot read the input {name}: it is a folder; write {name.rstrip('/')}/*.jsonl or {name.rstrip('/')}/*.parquet") from None
    except FileNotFoundError:
        raise JobError(f"cannot read the input {name}: No such file{hint}") from None
    except Exception as error:
        raise JobError(f"cannot read the input {name}: {getattr(error, 'strerror', None) or error or type(error).__name__}") from error


def _decompressor(suffix: str, name: str) -> Callable[[BinaryIO], BinaryIO]:
    if suffix == ".gz":
        return lambda stored: gzip.GzipFile(fileobj=stored)
    if suffix in (".bz2", ".xz"):
        return bz2.BZ2File if suffix == ".bz2" else lzma.LZMAFile
    try:
        from backports.zstd import ZstdFile
    except ImportError:
        raise JobError(f"cannot read the input {name}: .zst needs a package: pip install backports.zstd") from None
    return ZstdFile


def _suffixes(name: str) -> list[str]:
    """The name's suffixes in lower case, at least one; of a URL without its query."""
    path = urllib.parse.urlsplit(name).path if "://" in name else name
    return ["", "", *(suffix.lower() for suffix in pathlib.PurePosixPath(path).suffixes)]
