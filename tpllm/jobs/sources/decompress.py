"""What decompresses an input file, by its suffix. A file may be several streams in a row, as ``cat`` makes them."""
import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from typing import Any, BinaryIO

from tpllm.errors import JobError, log

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
BUFFER_BYTES = 1 << 16


def find_decompressor(suffix: str, name: str) -> Callable[[BinaryIO], BinaryIO]:
    """What makes the content of the stored bytes.

    Args:
        suffix: one of ``COMPRESSED_SUFFIXES``.
        name: how errors call the file.

    Raises:
        JobError: it needs a package that is not installed.
    """
    if suffix == ".gz":
        return lambda stored: gzip.GzipFile(fileobj=stored)
    if suffix in (".bz2", ".xz"):
        make = bz2.BZ2Decompressor if suffix == ".bz2" else lzma.LZMADecompressor
        return lambda stored: io.BufferedReader(_Streams(stored, make, name), BUFFER_BYTES)
    try:
        from backports.zstd import ZstdFile
    except ImportError:
        raise JobError(f"cannot read the input {name}: .zst needs a package: pip install backports.zstd") from None
    return ZstdFile


class _Streams(io.RawIOBase):
    """Streams of bzip2 or xz in a row. What follows the last one and is none is left out, as their own tools do, and the log tells of it;
    Python's readers say nothing."""

    def __init__(self, stored: BinaryIO, make: Callable[[], Any], name: str):
        self._stored, self._make, self._name = stored, make, name
        self._decompressor, self._unread, self._num_streams = make(), b"", 0
        self._has_begun = self._is_at_end = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._is_at_end:
            if data := self._decompress(len(buffer)):
                buffer[:len(data)] = data
                return len(data)
        return 0

    def _decompress(self, num_bytes: int) -> bytes:
        """The next bytes; none at the end of a stream, and where more has to be read first."""
        if not self._unread and (self._decompressor.needs_input or not self._has_begun):
            self._unread = self._stored.read(BUFFER_BYTES)
            if not self._unread:
                return self._end()
        given, self._unread = self._unread, b""
        try:
            data = self._decompressor.decompress(given, num_bytes)
        except (OSError, lzma.LZMAError):
            if self._num_streams == 0 or self._has_begun:
                raise
            return self._end(given)
        self._has_begun = True
        if self._decompressor.eof:
            self._unread = self._decompressor.unused_data.lstrip(b"\0")
            self._decompressor, self._has_begun = self._make(), False
            self._num_streams += 1
        return data

    def _end(self, rest: bytes = b"") -> bytes:
        if rest:
            log.warning("the input %s goes on behind its last compressed stream with what is none, which is left out", self._name)
        elif self._has_begun or not self._num_streams:
            raise EOFError("Compressed file ended before the end-of-stream marker was reached")
        self._is_at_end = True
        return b""
