"""Who holds an output folder: one process that writes to it, or any number that read what nobody may change meanwhile.

The lock is a ``flock`` on ``.lock`` in the folder, which the kernel gives back when its process dies; the file holds the writer's pid.
"""
import contextlib
import errno
import fcntl
import os
import pathlib
import time
from collections.abc import Iterator

from tpllm.errors import JobError
from tpllm.jobs.outputs.durable import writing_to

LOCK = ".lock"
# Whoever only asks for the holder has the lock for a moment: no reason to refuse a job that starts just then.
NUM_ATTEMPTS, ATTEMPT_S = 10, 0.02


@contextlib.contextmanager
def held_for_writing(folder: pathlib.Path) -> Iterator[None]:
    """Hold a folder that is there against every other process.

    Raises:
        JobError: another process holds it, or it cannot be written.
    """
    with writing_to(folder):
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not _try(fd, fcntl.LOCK_EX, num_attempts=NUM_ATTEMPTS):
            raise JobError(f"{_named(_pid(fd))} is running the job in {folder}; wait for it or stop it, or give this job another output")
        with writing_to(folder):
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def held_for_reading(folder: pathlib.Path) -> Iterator[None]:
    """Keep writers from a folder; nothing in it is changed, and it may be read-only.

    Raises:
        JobError: a process writes to it.
    """
    with _opened(folder) as fd:
        if fd is not None and not _try(fd, fcntl.LOCK_SH, num_attempts=1):
            raise JobError(f"{_named(_pid(fd))} is running the job in {folder}; wait for it, or stop it")
        yield


def writer_of(folder: pathlib.Path) -> int | None:
    """The pid of the process that writes to a folder, 0 where it is not known, or None where there is none."""
    with _opened(folder) as fd:
        return None if fd is None or _try(fd, fcntl.LOCK_SH, num_attempts=1) else _pid(fd)


@contextlib.contextmanager
def _opened(folder: pathlib.Path) -> Iterator[int | None]:
    try:
        fd = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # nobody has run here, or the folder was copied without it
        yield None
        return
    except OSError as error:
        raise JobError(f"cannot read {folder / LOCK}: {error.strerror}") from None
    try:
        yield fd
    finally:
        os.close(fd)


def _try(fd: int, kind: int, *, num_attempts: int) -> bool:
    for attempt in range(num_attempts):
        if attempt:
            time.sleep(ATTEMPT_S)
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise JobError(f"cannot lock the output folder: {error.strerror}; use a file system that has flock") from None
    return False


def _pid(fd: int) -> int:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else 0


def _named(pid: int) -> str:
    return f"another process (pid {pid})" if pid else "another process"
