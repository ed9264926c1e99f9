"""A file whose bytes are those that the first pass saw: hashed in blocks there, and compared block by block whenever it is read again.

So whatever becomes of a file while a job runs (replaced, written in place with its size and times kept, cut, appended to), a row is made of the
content that the manifest tells of, or of nothing. It holds for any storage and for what is compressed too, because it looks at stored bytes.
"""
import hashlib
import io
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

BLOCK_BYTES = 1 << 16
BLOCK_DIGEST_BYTES = 16
MAX_BLOCKS_AT_ONCE = 64


class Digest:
    """The SHA-256 and the length of a file's bytes, and a BLAKE2b of each block of ``BLOCK_BYTES`` of them: 16 bytes for 64 KiB."""

    def __init__(self):
        self.num_bytes, self._sha256 = 0, hashlib.sha256()
        self._blocks, self._block = bytearray(), hashlib.blake2b(digest_size=BLOCK_DIGEST_BYTES)

    def update(self, data: memoryview | bytes) -> None:
        """Take in the next bytes."""
        self._sha256.update(data)
        view = memoryview(data)
        while view:
            piece = view[:BLOCK_BYTES - self.num_bytes % BLOCK_BYTES]
            self._block.update(piece)
            self.num_bytes += len(piece)
            view = view[len(piece):]
            if self.num_bytes % BLOCK_BYTES == 0:
                self._blocks += self._block.digest()
                self._block = hashlib.blake2b(digest_size=BLOCK_DIGEST_BYTES)

    def hexdigest(self) -> str:
        """The SHA-256 in hex."""
        return self._sha256.hexdigest()

    def is_block(self, index: int, data: memoryview | bytes) -> bool:
        """Whether these bytes are the block of that number; the last one may be short, and behind it there are none."""
        if index * BLOCK_BYTES >= self.num_bytes:
            return not data
        stored = bytes(self._blocks[index * BLOCK_DIGEST_BYTES:(index + 1) * BLOCK_DIGEST_BYTES]) or self._block.digest()
        return hashlib.blake2b(data, digest_size=BLOCK_DIGEST_BYTES).digest() == stored


class VerifiedFile(io.RawIOBase):
    """A file to read, at any place, of which every byte is compared with what a digest saw before it is given out.

    Args:
        file: the stored bytes; closed with this one.
        digest: of the whole file.
        refuse: called where a byte is another one; it raises.
    """

    def __init__(self, file: BinaryIO, digest: Digest, refuse: Callable[[], NoReturn]):
        self._file, self._digest, self._refuse = file, digest, refuse
        self._position = self._start = 0
        self._blocks = memoryview(b"")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self._digest.num_bytes)[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._digest.num_bytes:
            if self._file.tell() == self._digest.num_bytes and self._file.read(1):
                self._refuse()
            return 0
        if not self._start <= self._position < self._start + len(self._blocks):
            self._load(len(buffer))
        first = self._position - self._start
        piece = self._blocks[first:first + len(buffer)]
        buffer[:len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _load(self, num_bytes: int) -> None:
        """Read the blocks that hold the next bytes, which are there."""
        index = self._position // BLOCK_BYTES
        num_blocks = min(-(-(self._position - index * BLOCK_BYTES + num_bytes) // BLOCK_BYTES), MAX_BLOCKS_AT_ONCE)
        self._start = index * BLOCK_BYTES
        self._blocks = memoryview(self._read(self._start, num_blocks * BLOCK_BYTES))
        for place in range(num_blocks):
            block = self._blocks[place * BLOCK_BYTES:(place + 1) * BLOCK_BYTES]
            if not self._digest.is_block(index + place, block):
                self._refuse()

    def _read(self, start: int, num_bytes: int) -> bytes:
        """That many stored bytes, or all up to the end."""
        if self._file.tell() != start:
            self._file.seek(start)
        data = bytearray()
        while len(data) < num_bytes and (piece := self._file.read(num_bytes - len(data))):
            data += piece
        return bytes(data)
