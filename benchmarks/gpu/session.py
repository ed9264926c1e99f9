"""One run of the benchmark: its workers, its budget, and its report, which grows section by section."""
import dataclasses
import json
import os
import pathlib
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.gpu.bars import find_bars
from benchmarks.gpu.worker import TaskError, Worker

ON_GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
WORKERS = ("jax", "torch", "transformers", "plan")


def _on_cpu() -> dict[str, str]:
    """Eight devices, as Pallas's interpreter of GPU kernels needs a thread for each warp group, and XLA has as many as devices at least."""
    return {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"}


class OutOfTimeError(Exception):
    """The budget leaves no time for what comes."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the benchmark.

    Attributes:
        name: as ``--only`` takes it.
        run: fills the section's dict.
        reserve_s: what sections before it must leave for it.
    """

    name: str
    run: Callable[["Session", dict[str, Any]], None]
    reserve_s: float


class Session:
    """A run.

    Args:
        is_tiny: tiny shapes on the CPU.
        seconds: of the budget.
        path: the report is written there after each section; None for nowhere.
    """

    def __init__(self, *, is_tiny: bool, seconds: float, path: pathlib.Path | None):
        self.is_tiny, self._path, self._began = is_tiny, path, time.monotonic()
        self._end = self._limit = self._began + seconds
        environment = {**OFFLINE, **(_on_cpu() if is_tiny else ON_GPU)}
        # A plan compiles for a device as it would without one: it must not take memory on the one that is here.
        self.workers = {name: Worker(name, {**environment, **({"JAX_PLATFORMS": ""} if name == "plan" else {})}) for name in WORKERS}
        self.report: dict[str, Any] = {"benchmark": "gpu", "machine": {}, "setup": {"is_tiny": is_tiny, "budget_s": seconds}, "sections": {}}

    @property
    def left_s(self) -> float:
        """Seconds until the running section must make room for the next ones."""
        return self._limit - time.monotonic()

    def timeout(self, at_most: float) -> float:
        """A time limit of a task: ``at_most``, or what is left.

        Raises:
            OutOfTimeError: nothing worth beginning.
        """
        if self.left_s < 2:
            raise OutOfTimeError
        return min(at_most, self.left_s)

    def run(self, sections: Sequence[Section]) -> None:
        """Run sections in their order, each with what the later ones do not need."""
        for index, section in enumerate(sections):
            self._limit = self._end - sum(later.reserve_s for later in sections[index + 1:]) * self._scale
            self._run_one(section)
            self.write()
        self.report["seconds"] = time.monotonic() - self._began

    @property
    def _scale(self) -> float:
        """Reserves are for nine minutes; a smaller budget keeps their proportions."""
        return min(1.0, (self._end - self._began) / 540)

    def _run_one(self, section: Section) -> None:
        entry = self.report["sections"][section.name] = {"status": "done"}
        began = time.monotonic()
        try:
            section.run(self, entry)
        except OutOfTimeError:
            entry.setdefault("not_run", []).append("the rest: the budget of time was used up")
        except TaskError as error:
            entry |= {"status": "failed", "error": str(error), "details": error.details}
        except Exception as error:
            entry |= {"status": "failed", "error": f"{type(error).__name__}: {error}", "details": traceback.format_exc()}
        if entry["status"] == "done" and entry.get("not_run"):
            entry["status"] = "partly" if entry.get("entries") or entry.get("best") else "not run"
        entry["seconds"] = time.monotonic() - began

    def write(self) -> None:
        """Judge the bars, and write what there is."""
        self.report["bars"] = [bar.entry() for bar in find_bars(self.report)]
        if self._path is not None:
            partial = self._path.with_name(f"{self._path.name}.part")
            partial.write_text(json.dumps(self.report, indent=1) + "\n")
            os.replace(partial, self._path)

    def close(self) -> None:
        """End every worker."""
        for worker in self.workers.values():
            worker.stop()

    def entries(self, section: str) -> list[Mapping[str, Any]]:
        """What a section before this one found."""
        return self.report["sections"].get(section, {}).get("entries", [])
