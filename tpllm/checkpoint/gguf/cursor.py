"""Reading the values of a GGUF file one after the other: each length is checked against the bytes that are left before anything is made of it."""
import io
import struct

import numpy as np

from tpllm.checkpoint.safetensors import read_exactly
from tpllm.errors import CheckpointError

WINDOW_BYTES = 2**20
MAX_HEADER_BYTES = 200_000_000
"""The most bytes of metadata and the table of tensors; the largest vocabularies take about 20 MB."""
MAX_KEY_BYTES = 65535
MAX_NESTED = 4
STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8"}
LEAST_BYTES = {kind: np.dtype(dtype).itemsize for kind, dtype in NUMBERS.items()} | {STRING: 8, ARRAY: 12}
"""That a value of each type takes at least."""
AGAIN = "Download or copy it again"

Value = bool | int | float | str | np.ndarray | tuple
"""Arrays of numbers and booleans are read-only numpy arrays, of texts and of arrays tuples."""


class Cursor:
    """A place in a file's header.

    Args:
        file: open to read.
        size: of it.
    """

    def __init__(self, file: io.FileIO, size: int):
        self.path, self._file = file.name, file
        self._limit = min(size, MAX_HEADER_BYTES)
        self._window, self._begin, self._at = b"", 0, 0

    @property
    def position(self) -> int:
        """Bytes from the beginning of the file."""
        return self._begin + self._at

    @property
    def num_left(self) -> int:
        """Bytes up to the end of the file, or of what a header may take."""
        return self._limit - self.position

    def take(self, num_bytes: int, what: str) -> bytes:
        """The next bytes.

        Raises:
            CheckpointError: so many are not there.
        """
        self._need(num_bytes, what)
        taken = self._window[self._at:self._at + num_bytes]
        self._at += num_bytes
        return taken

    def number(self, kind: int, what: str) -> int | float | bool:
        """A number of one of the types :data:`NUMBERS`."""
        dtype = NUMBERS[kind]
        value = np.frombuffer(self.take(LEAST_BYTES[kind], what), dtype)[0].item()
        if kind == BOOL and value > 1:
            raise CheckpointError(f"{self.path}: {what} is the boolean {value}; it must be 0 or 1. {AGAIN}")
        return bool(value) if kind == BOOL else value

    def u32(self, what: str) -> int:
        """An unsigned number of 4 bytes."""
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        """An unsigned number of 8 bytes."""
        return int.from_bytes(self.take(8, what), "little")

    def text(self, what: str, *, max_bytes: int | None = None) -> str:
        """A length and so many bytes of UTF-8."""
        length = self.u64(f"the length of {what}")
        if max_bytes is not None and length > max_bytes:
            raise CheckpointError(f"{self.path}: {what} has {length} bytes; the limit is {max_bytes}. It is not a GGUF file, or damaged")
        return self._decoded(self.take(length, what), what)

    def value(self, kind: int, what: str, *, depth: int = 0) -> Value:
        """A value of metadata.

        Raises:
            CheckpointError: an unknown type, arrays nested too deeply, more items than the file can hold.
        """
        if kind == STRING:
            return self.text(what)
        if kind in NUMBERS:
            return self.number(kind, what)
        if kind != ARRAY:
            raise CheckpointError(f"{self.path}: {what} has the unknown type {kind}; known: 0 to 12. It is damaged, or of a later format")
        if depth == MAX_NESTED:
            raise CheckpointError(f"{self.path}: {what} has arrays in arrays, more than {MAX_NESTED} deep, the limit")
        kind, count = self.u32(f"the type of {what}"), self.u64(f"the count of {what}")
        if kind not in LEAST_BYTES:
            raise CheckpointError(f"{self.path}: the items of {what} have the unknown type {kind}; known: 0 to 12. It is damaged, or a later format")
        self.check_count(count, LEAST_BYTES[kind], what)
        if kind == STRING:
            return self._texts(count, what)
        if kind == ARRAY:
            return tuple(self.value(ARRAY, what, depth=depth + 1) for _ in range(count))
        values = np.frombuffer(self.take(count * LEAST_BYTES[kind], what), NUMBERS[kind])
        if kind == BOOL and values.size and values.max() > 1:
            raise CheckpointError(f"{self.path}: {what} holds the boolean {values.max()}; it must be 0 or 1. {AGAIN}")
        return values.view(np.bool_) if kind == BOOL else values

    def check_count(self, count: int, least_bytes: int, what: str) -> None:
        """Refuse more items than the rest of the file can hold."""
        if count * least_bytes > self.num_left:
            raise CheckpointError(f"{self.path}: {what} counts {count} items of {least_bytes} or more bytes; {self.num_left} bytes are left "
                                  f"{self._of_what()}. It is truncated or damaged. {AGAIN}")

    def _texts(self, count: int, what: str) -> tuple[str, ...]:
        """Many texts, as a vocabulary has them: no call for each as long as they lie in the window."""
        texts, length_of = [], struct.Struct("<Q").unpack_from
        append, window, at, end = texts.append, self._window, self._at, len(self._window)
        for index in range(count):
            begin = at + 8
            if begin <= end and (at := begin + length_of(window, begin - 8)[0]) <= end:
                raw = window[begin:at]
            else:
                self._at = begin - 8
                raw = self.take(self.u64(f"the length of an item of {what}"), f"an item of {what}")
                window, at, end = self._window, self._at, len(self._window)
            try:
                append(raw.decode())
            except UnicodeDecodeError:
                self._decoded(raw, f"item {index} of {what}")
        self._at = at
        return tuple(texts)

    def _decoded(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8: {raw[:40]!r}. It is damaged; download or convert it again") from None

    def _need(self, num_bytes: int, what: str) -> None:
        if self._at + num_bytes <= len(self._window):
            return
        if num_bytes > self.num_left:
            raise CheckpointError(f"{self.path}: {what} needs {num_bytes} bytes at byte {self.position}; {max(self.num_left, 0)} are left "
                                  f"{self._of_what()}. It is truncated or damaged. {AGAIN}")
        self._begin, self._at = self.position, 0
        self._window = read_exactly(self._file, start=self._begin, num_bytes=min(max(num_bytes, WINDOW_BYTES), self.num_left))

    def _of_what(self) -> str:
        return f"of the {MAX_HEADER_BYTES} that metadata may take" if self._limit == MAX_HEADER_BYTES else "in the file"
