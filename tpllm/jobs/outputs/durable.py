"""The few calls by which a job writes to disk, in one place, so that tests can make any of them fail or be the last."""
import contextlib
import errno
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator

from tpllm.errors import JobError

CHUNK_BYTES = 1 << 20
# Why a file cannot get a second name though it can be copied: another device, no hard links there, too many, or somebody else's file.
NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class Disk:
    """Writes that survive ``kill -9`` and, once synced, a loss of power. POSIX only."""

    def create(self, path: pathlib.Path) -> int:
        """A descriptor for reading and appending to ``path``, which need not exist."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def append(self, fd: int, data: bytes) -> None:
        """Write all of ``data`` at the end of a file."""
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view):]

    def truncate(self, fd: int, num_bytes: int) -> None:
        """Cut a file to its first ``num_bytes``."""
        os.ftruncate(fd, num_bytes)

    def sync(self, fd: int) -> None:
        """Wait until a file's content is on the device."""
        os.fsync(fd)

    def replace(self, source: pathlib.Path, target: pathlib.Path) -> None:
        """Give ``source`` the name ``target`` in one step."""
        os.replace(source, target)

    def link(self, source: pathlib.Path, target: pathlib.Path) -> None:
        """Give a file the second name ``target``."""
        os.link(source, target)

    def remove(self, path: pathlib.Path) -> None:
        """Delete a file if it is there."""
        path.unlink(missing_ok=True)

    def sync_folder(self, folder: pathlib.Path) -> None:
        """Wait until the names in a folder are on the device."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_whole(disk: Disk, path: pathlib.Path, lines: Iterable[bytes], *, before_rename: Callable[[], None] = lambda: None) -> None:
    """Put a file in place all at once: written and synced under ``path``.tmp, renamed, and the folder synced.

    Args:
        disk: how to write.
        path: the file.
        lines: its content.
        before_rename: called when all is written and nothing is in place.
    """
    temporary = path.with_name(path.name + ".tmp")
    disk.remove(temporary)
    fd = disk.create(temporary)
    try:
        for chunk in _chunks(lines):
            disk.append(fd, chunk)
        disk.sync(fd)
    finally:
        os.close(fd)
    before_rename()
    disk.replace(temporary, path)
    disk.sync_folder(path.parent)


def place(disk: Disk, source: pathlib.Path, target: pathlib.Path) -> None:
    """Put a file that is complete elsewhere in place, all at once: as a second name of the same content where the file system can, else as a
    copy. The source stays."""
    if target.exists() and os.path.samefile(source, target):
        disk.sync_folder(target.parent)
        return
    temporary = target.with_name(target.name + ".tmp")
    disk.remove(temporary)
    try:
        disk.link(source.resolve(), temporary)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        with source.open("rb") as file:
            write_whole(disk, target, iter(lambda: file.read(CHUNK_BYTES), b""))
        return
    with temporary.open("rb") as file:
        disk.sync(file.fileno())  # a source that was copied here may not be on the device yet
    disk.replace(temporary, target)
    disk.sync_folder(target.parent)


def _chunks(lines: Iterable[bytes]) -> Iterator[bytes]:
    buffer = bytearray()
    for line in lines:
        buffer += line
        if len(buffer) >= CHUNK_BYTES:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)


@contextlib.contextmanager
def writing_to(folder: pathlib.Path) -> Iterator[None]:
    """Turn a failed write below ``folder`` into a :class:`JobError` that says what to do."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and str(error.filename) != str(folder) else ""
        raise JobError(f"cannot write to the output folder {folder}: {error.strerror or error}{where}; what is written there is kept: "
                       "make the folder writable, with space left, and run the job again to go on") from error
