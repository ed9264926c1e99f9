"""One file of a job's input, local or remote: opened, decompressed, hashed, and watched for change."""
import contextlib
import io
import os
import pathlib
import stat
import urllib.parse
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

import fsspec
from fsspec.asyn import AsyncFileSystem

from tpllm.errors import JobError, TpllmError
from tpllm.jobs.sources.decompress import COMPRESSED_SUFFIXES, find_decompressor
from tpllm.jobs.sources.verified import BLOCK_BYTES, Digest, VerifiedFile

JSONL, CSV, PARQUET = "jsonl", "csv", "parquet"
PARQUET_SUFFIXES = (".parquet", ".pq")
OTHER_SUFFIXES = (".tsv", ".zip", ".tar", ".tgz", ".lz4", ".7z", ".arrow", ".feather", ".orc", ".avro", ".xlsx")
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
        kind: ``"jsonl"``, ``"csv"`` or ``"parquet"``, by the name.

    Raises:
        JobError: a kind that is not supported, or a file that cannot be read.
    """

    def __init__(self, name: str, path: str, filesystem: fsspec.AbstractFileSystem | None = None):
        self.name, self._path, self._filesystem = name, path, filesystem
        suffixes = _suffixes(name)
        is_compressed = suffixes[-1] in COMPRESSED_SUFFIXES
        self.kind = PARQUET if suffixes[-1] in PARQUET_SUFFIXES else CSV if suffixes[-1 - is_compressed] == ".csv" else JSONL
        if any(suffix in OTHER_SUFFIXES + PARQUET_SUFFIXES * is_compressed for suffix in suffixes[-1 - is_compressed:]):
            raise JobError(f"cannot read the input {name}: it must be JSONL or CSV (also .gz, .bz2, .xz or .zst), or Parquet (which compresses "
                           "inside)")
        self._decompress = find_decompressor(suffixes[-1], name) if is_compressed else None
        self._digest: Digest | None = None
        with reading(name, hint=f" (paths are relative to the working directory, here {pathlib.Path.cwd()})" if filesystem is None else ""):
            self._stamp = self._stat()
            self.open().close()

    def open(self) -> BinaryIO:
        """The bytes as they are stored; once they were scanned, only those.

        Raises:
            JobError: the file is not the one that this was made of, or, while it is read, a byte is not the one that was scanned.
        """
        file = self._open()
        if self._digest is None:
            return file
        buffer_bytes = BLOCK_BYTES if self.kind == PARQUET else BUFFER_BYTES  # Parquet's reads are few and scattered
        return io.BufferedReader(VerifiedFile(file, self._digest, self.refuse_change), buffer_bytes)

    @property
    def location(self) -> str:
        """What two names of one file have in common."""
        return os.path.realpath(self._path) if self._filesystem is None else self._filesystem.unstrip_protocol(self._path)

    @contextlib.contextmanager
    def scanned(self) -> Iterator[tuple[BinaryIO, Digest]]:
        """The content, decompressed, for the first time, with a digest that is complete when the block is; from then on the file gives the bytes
        that it saw, or an error.

        Raises:
            JobError: a file that cannot be read or decompressed.
        """
        digest = Digest()
        with reading(self.name), contextlib.closing(self._followed(digest)) as stored, contextlib.closing(self._decompressed(stored)) as content:
            yield content, digest
            while stored.read(BUFFER_BYTES):  # what a decompressor leaves unread after its last stream
                pass
        if self._decompress and not digest.num_bytes:
            raise JobError(f"cannot read the input {self.name}: it has 0 bytes, and a compressed file of no rows has some: it was cut or not "
                           "written; write it again, or leave it out")
        self._digest = digest

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The content, decompressed.

        Raises:
            JobError: a file that cannot be read or decompressed, or that is not the one that was scanned.
        """
        with (reading(self.name), contextlib.closing(self.open() if self._digest else self._followed(Digest())) as stored,
              contextlib.closing(self._decompressed(stored)) as content):
            yield content

    def check_unchanged(self) -> None:
        """Make sure that the file is still what it was, as far as its size and times tell.

        Raises:
            JobError: it is not.
        """
        with reading(self.name):
            if self._stat() != self._stamp:
                self.refuse_change()

    def refuse_change(self) -> NoReturn:
        """Say that the file is another one than it was."""
        was = f"it had {self._digest.num_bytes} bytes of SHA-256 {self._digest.hexdigest()[:12]}... when it was scanned; " if self._digest else ""
        raise JobError(f"the input {self.name} changed while the job ran: {was}what is written belongs to the old content: restore it to go on, or "
                       "give the new content another output")

    def _followed(self, digest: Digest) -> BinaryIO:
        return io.BufferedReader(_Followed(self._open(), digest), BUFFER_BYTES)

    def _decompressed(self, stored: BinaryIO) -> BinaryIO:
        return self._decompress(stored) if self._decompress else stored

    def _open(self) -> BinaryIO:
        if self._filesystem is None:
            file = open(self._path, "rb")
            if _local_stamp(os.fstat(file.fileno())) != self._stamp:  # the descriptor's own: another file may have taken the name just now
                file.close()
                self.refuse_change()
            return file
        self.check_unchanged()
        # Parquet is read in ranges of its own; to read ahead of each would fetch most of the file several times.
        is_ranged = self.kind == PARQUET and isinstance(self._filesystem, AsyncFileSystem)
        return self._filesystem.open(self._path, "rb", **({"cache_type": "none"} if is_ranged else {}))

    def _stat(self) -> tuple[Any, ...]:
        if self._filesystem is None:
            status = os.stat(self._path)
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                raise JobError(f"cannot read the input {self.name}: it is a pipe or a device, which can be read once, and a job reads its input "
                               "twice; write it to a file first")
            return _local_stamp(status)
        self._filesystem.invalidate_cache()
        info = self._filesystem.info(self._path)
        if info.get("type") == "directory":
            raise IsADirectoryError("Is a directory")
        return tuple(str(info.get(key)) for key in STAMP_KEYS)


def _local_stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns


class _Followed(io.RawIOBase):
    """A file read from its beginning to its end, with a digest that follows."""

    def __init__(self, file: BinaryIO, digest: Digest):
        self._file, self._digest = file, digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[:len(data)] = data
        self._digest.update(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@contextlib.contextmanager
def reading(name: str, *, hint: str = "") -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into a :class:`JobError`: each kind of storage and compression has errors of its own."""
    try:
        yield
    except (TpllmError, MemoryError, AssertionError):
        raise
    except IsADirectoryError:
        raise JobError(f"cannot read the input {name}: it is a folder; write {name.rstrip('/')}/*.jsonl, *.csv or *.parquet") from None
    except FileNotFoundError:
        raise JobError(f"cannot read the input {name}: No such file{hint}") from None
    except Exception as error:
        raise JobError(f"cannot read the input {name}: {getattr(error, 'strerror', None) or error or type(error).__name__}") from error


def _suffixes(name: str) -> list[str]:
    """The name's suffixes in lower case, at least one; of a URL without its query."""
    path = urllib.parse.urlsplit(name).path if "://" in name else name
    return ["", "", *(suffix.lower() for suffix in pathlib.PurePosixPath(path).suffixes)]
