"""Disks that fail, or that are the last thing a process does. None of them waits for the device: what a sync means is simulated."""
import os
import pathlib

from tpllm.jobs.outputs.durable import Disk

MOMENTS = ("before", "half", "after")


class Death(BaseException):
    """The process is no more."""


class QuickDisk(Disk):
    """A disk that never waits."""

    def sync(self, fd):
        pass

    def sync_folder(self, folder):
        pass


class FaultyDisk(QuickDisk):
    """Call number ``number`` (from 0) ends in ``fault()``: before it does anything, after it, or half way (only appends are counted then).

    With ``is_mortal`` every later call ends in the fault too: a dead process writes nothing.
    """

    def __init__(self, number: int, moment: str, fault, *, is_mortal: bool = True):
        self.num_calls, self.number, self.moment, self.fault, self.is_mortal = 0, number, moment, fault, is_mortal
        self.is_dead = False

    @property
    def has_struck(self) -> bool:
        return self.num_calls > self.number

    def _call(self, function, *arguments, half=None):
        if self.is_dead and self.is_mortal:
            self.fault()
        is_counted = half is not None or self.moment != "half"
        is_last = is_counted and self.num_calls == self.number
        self.num_calls += is_counted
        self.is_dead |= is_last
        if is_last and self.moment == "before":
            self.fault()
        if is_last and self.moment == "half":
            half()
            self.fault()
        result = function(*arguments)
        if is_last:
            self.fault()
        return result

    def create(self, path):
        return self._call(super().create, path)

    def append(self, fd, data):
        write = super().append
        self._call(write, fd, data, half=lambda: write(fd, data[:len(data) // 2]))

    def truncate(self, fd, num_bytes):
        self._call(super().truncate, fd, num_bytes)

    def sync(self, fd):
        self._call(super().sync, fd)

    def replace(self, source, target):
        self._call(super().replace, source, target)

    def link(self, source, target):
        self._call(super().link, source, target)

    def remove(self, path):
        self._call(super().remove, path)

    def sync_folder(self, folder):
        self._call(super().sync_folder, folder)


class PowerLossDisk(FaultyDisk):
    """A disk whose machine loses power at the fault: :meth:`lose_power` then takes back all that was not synced, the worst that may happen."""

    def __init__(self, number: int, moment: str):
        super().__init__(number, moment, self._die)
        self._synced: dict[int, int] = {}
        self._undo: list = []

    def _die(self):
        raise Death

    def create(self, path):
        is_new = not path.exists()
        if not is_new and os.stat(path).st_ino not in self._synced:
            self._synced[os.stat(path).st_ino] = os.stat(path).st_size  # from an earlier run, whose machine went on
        fd = super().create(path)
        if is_new:
            self._synced[os.fstat(fd).st_ino] = 0
            self._undo.append(lambda: path.unlink(missing_ok=True))
        return fd

    def sync(self, fd):
        super().sync(fd)
        self._synced[os.fstat(fd).st_ino] = os.fstat(fd).st_size

    def replace(self, source, target):
        former = self._durable(target)
        super().replace(source, target)

        def undo():
            source.write_bytes(self._durable(target))
            target.unlink() if former is None else target.write_bytes(former)
        self._undo.append(undo)

    def link(self, source, target):
        super().link(source, target)
        self._undo.append(lambda: target.unlink(missing_ok=True))

    def remove(self, path):
        former = self._durable(path)
        super().remove(path)
        if former is not None:
            self._undo.append(lambda: path.write_bytes(former))

    def sync_folder(self, folder):
        super().sync_folder(folder)
        self._undo.clear()

    def _durable(self, path: pathlib.Path) -> bytes | None:
        if not path.exists():
            return None
        return path.read_bytes()[:self._synced.get(path.stat().st_ino, path.stat().st_size)]

    def lose_power(self, folder: pathlib.Path) -> None:
        for path in folder.iterdir() if folder.exists() else ():
            path.write_bytes(self._durable(path))
        for undo in reversed(self._undo):
            undo()
