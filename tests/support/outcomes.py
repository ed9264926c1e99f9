"""What becomes of damaged files: whether they are refused by an error that users can read, in which time and memory, in a process of their own,
so that one which dies or hangs is seen too."""
import dataclasses
import multiprocessing
import pathlib
import resource
import time
from collections.abc import Callable, Iterable, Iterator

from tpllm.errors import TpllmError

MAX_SECONDS, MAX_BYTES, MAX_MESSAGE = 5.0, 1_000_000_000, 3000
HANG_SECONDS = 60.0
CLEAR_PEAK, STATUS = pathlib.Path("/proc/self/clear_refs"), pathlib.Path("/proc/self/status")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one damaged file.

    Attributes:
        label: what was done to it.
        error: None where it was taken, else the error as text.
        is_typed: whether it was taken, or refused by a :class:`TpllmError`.
        seconds: of its process's CPU time, or until it counted as hung.
        num_bytes: the process's memory grew by at most.
    """

    label: str
    error: str | None
    is_typed: bool
    seconds: float
    num_bytes: int

    @property
    def fault(self) -> str | None:
        """What is wrong with it, or None."""
        if not self.is_typed:
            return f"{self.label}: {self.error}"
        if self.seconds > MAX_SECONDS or self.num_bytes > MAX_BYTES:
            return f"{self.label}: {self.seconds:.1f} s, {self.num_bytes / 1e6:.0f} MB ({self.error})"
        return f"{self.label}: {len(self.error)} characters of message" if self.error and len(self.error) > MAX_MESSAGE else None


def tried(load: Callable[[bytes], object], cases: Iterable[tuple[str, bytes]], *, hang_seconds: float = HANG_SECONDS) -> Iterator[Outcome]:
    """Each case's outcome, from a process of its own (a new one where one died).

    Args:
        load: a function of a module, or a ``functools.partial`` of one, that takes the file's bytes.
        cases: (label, bytes) of each.
        hang_seconds: after which a case counts as hung, and its process is killed.
    """
    child = None
    try:
        for label, data in cases:
            child = child or _Child(load)
            outcome = child.outcome(label, data, hang_seconds)
            if outcome is None:
                code = child.end()
                child = None
                outcome = Outcome(label, f"the process ended with {code} or hung for {hang_seconds:g} s", False, hang_seconds, 0)
            yield outcome
    finally:
        if child is not None:
            child.end()


class _Child:
    """A process that loads what it is sent."""

    def __init__(self, load: Callable[[bytes], object]):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(load, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()  # it has imported what it needs: that does not count as the first case's

    def outcome(self, label: str, data: bytes, hang_seconds: float) -> Outcome | None:
        try:
            self.pipe.send_bytes(data)
            return Outcome(label, *self.pipe.recv()) if self.pipe.poll(hang_seconds) else None
        except (EOFError, OSError):
            return None

    def end(self) -> int | None:
        self.pipe.close()
        self.process.join(1)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self.process.exitcode


def _serve(load: Callable[[bytes], object], pipe) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send(None)
    while True:
        try:
            data = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        before, start = _memory(is_peak=False), time.process_time()  # what other processes take of this machine is no fault of the case
        error, is_typed = None, True
        try:
            load(data)
        except TpllmError as refusal:
            error = f"{type(refusal).__name__}: {refusal}"
        except BaseException as failure:
            error, is_typed = f"{type(failure).__module__}.{type(failure).__name__}: {failure}"[:3000], False
        pipe.send((error, is_typed, time.process_time() - start, max(_memory(is_peak=True) - before, 0)))


def _memory(*, is_peak: bool) -> int:
    """Bytes of this process in memory now, or at most since this was last asked for now."""
    try:
        if not is_peak:
            CLEAR_PEAK.write_text("5")
        return 1024 * int(STATUS.read_text().partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError, ValueError):  # no Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
