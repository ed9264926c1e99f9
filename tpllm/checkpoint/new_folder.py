"""A folder that is there whole or not at all."""
import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tpllm.errors import ConfigError


@contextlib.contextmanager
def new_folder(out: Path, *, num_bytes: int) -> Iterator[Path]:
    """A temporary sibling of ``out`` to write into; at the end of the block all of it is on the disk and has ``out``'s name.

    An error removes it. What a killed process left is removed by the next one, which knows by a lock that nobody writes there.

    Raises:
        ConfigError: ``out`` is there, another process writes it, or the disk has less than ``num_bytes`` and a little more.
    """
    part = out.with_name(f".{out.name}.partial")
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists; give a folder that does not, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    part.mkdir(exist_ok=True)
    lock = os.open(part, os.O_RDONLY)
    try:
        _lock(lock, part, out)
        _empty(part)
        try:
            free = shutil.disk_usage(part).free
            if free < num_bytes + 2**24:
                raise ConfigError(f"{out} takes {num_bytes:,} bytes; {free:,} are free there")
            yield part
            _sync(part)
            os.rename(part, out)
            _sync_one(out.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _lock(lock: int, part: Path, out: Path) -> None:
    """Hold the folder; what another process has just renamed is not ours."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = os.fstat(lock).st_ino == os.stat(part).st_ino and not os.path.lexists(out)
    except (BlockingIOError, FileNotFoundError):
        is_ours = False
    if not is_ours:
        raise ConfigError(f"another process writes {out}; wait for it, or give another folder")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
