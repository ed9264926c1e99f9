"""SIGINT, SIGTERM and ``kill -9`` at random moments of start-up, run, resume, dry run and merge: nothing is lost or doubled, exit codes are right.

One moment of each kind and signal is tried with the slow tests. ``TPLLM_SIGNAL_MOMENTS=60 pytest -m slow tests/jobs/test_signals_at_any_moment.py
-s`` tries 60, 12 of each kind, with all that the real engine imports, and prints what became of them; ``TPLLM_SIGNAL_SEED`` chooses others.
"""
import collections
import dataclasses
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.jobs.fake_job_process import REPOSITORY, NoSleepLLM
from tests.jobs.small_job import contents, rows_text
from tpllm.jobs.config import JobConfig
from tpllm.jobs.merge import merge_shards
from tpllm.jobs.runner import run_job

NUM_ROWS, NUM_BAD, MAX_NUM_SEQS = 48, 2, 4
TEXT = rows_text(NUM_ROWS, bad=(9, 30))
PATIENCE_S = 600
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


class Trials:
    """Processes of one job that get a signal each; what must hold of each kind is in the method of its name.

    Moments are drawn in a process's own CPU time while it starts, and in rows begun while it runs: seconds would differ with the machine's load.

    Args:
        folder: of this test.
        draw: the moments.
        imports_all: whether each process imports what the real engine does, which takes seconds.
    """

    def __init__(self, folder: pathlib.Path, draw: random.Random, *, imports_all: bool):
        self._folder, self._draw, self._numbers = folder, draw, itertools.count()
        self._calls = folder / "calls"
        self._environment = {**os.environ, "TPLLM_TEST_IMPORTS": "all" if imports_all else ""}
        self.outcomes: collections.Counter = collections.Counter()
        (folder / "rows.jsonl").write_text(TEXT)
        whole, self._half = self._job("whole"), self._job("half")
        run_job(whole, make_llm=NoSleepLLM)
        self._wanted = contents(pathlib.Path(whole.output))
        self._shards = [dataclasses.replace(self._job("shards"), shard=f"{index}/2") for index in range(2)]
        for shard in self._shards:
            run_job(shard, make_llm=NoSleepLLM)
        process = self._start(self._half)
        while "rows" not in process.stderr.readline():
            assert process.poll() is None
        self._startup_s = cpu_seconds(process)
        self._wait_for_rows(process, NUM_ROWS // 2)
        process.kill()
        self._end(process)

    def startup(self, number: signal.Signals) -> None:
        self._interrupt_a_run(self._job(f"start-{next(self._numbers)}"), number, self._draw.uniform(0, self._startup_s), num_rows=0)

    def run(self, number: signal.Signals) -> None:
        self._interrupt_a_run(self._job(f"run-{next(self._numbers)}"), number, 0, num_rows=self._draw.randint(1, NUM_ROWS - NUM_BAD))

    def resume(self, number: signal.Signals) -> None:
        job = self._job(f"resume-{next(self._numbers)}")
        shutil.copytree(self._half.output, job.output)
        is_starting = self._draw.random() < 0.5
        self._interrupt_a_run(job, number, self._draw.uniform(0, self._startup_s) if is_starting else 0,
                              num_rows=0 if is_starting else self._draw.randint(1, NUM_ROWS // 3))

    def dry_run(self, number: signal.Signals) -> None:
        job = self._job(f"dry-{next(self._numbers)}")
        process = self._start(job, "--dry-run")
        self._wait_for_cpu(process, self._draw.uniform(0, 1.2 * self._startup_s))
        self._send(process, number, "dry-run")
        assert not pathlib.Path(job.output).exists()

    def merge(self, number: signal.Signals) -> None:
        output = self._folder / f"merge-{next(self._numbers)}"
        before = [contents(pathlib.Path(shard.folder)) for shard in self._shards]
        process = self._begin(["job", "merge", str(output), *(shard.folder for shard in self._shards)])
        self._wait_for_cpu(process, self._draw.uniform(0, 0.9 * self._startup_s))
        self._send(process, number, "merge")
        merge_shards(str(output), [shard.folder for shard in self._shards])
        assert contents(output) == self._wanted
        assert [contents(pathlib.Path(shard.folder)) for shard in self._shards] == before

    def _job(self, name: str) -> JobConfig:
        engine = {"max_num_seqs": MAX_NUM_SEQS, "tick_s": 0.03, "calls": str(self._calls)}
        return JobConfig(model="fake", input=str(self._folder / "rows.jsonl"), output=str(self._folder / name), rows_per_part=4, engine=engine)

    def _interrupt_a_run(self, job: JobConfig, number: signal.Signals, moment_s: float, *, num_rows: int) -> None:
        self._calls.write_text("")
        process = self._start(job)
        self._wait_for_cpu(process, moment_s)
        self._wait_for_rows(process, num_rows)
        code = self._send(process, number, pathlib.Path(job.output).name.partition("-")[0])
        result = run_job(job, make_llm=NoSleepLLM)
        assert result.is_complete
        assert code != 0 or result.num_new == 0
        assert contents(pathlib.Path(job.output)) == self._wanted
        assert len(self._calls.read_text().splitlines()) - (NUM_ROWS - NUM_BAD) <= MAX_NUM_SEQS  # those that were running

    def _start(self, job: JobConfig, *words: str) -> subprocess.Popen:
        path = pathlib.Path(f"{job.output}.yaml")
        path.write_text(json.dumps({"model": job.model, "input": job.input, "output": job.output, "rows_per_part": job.rows_per_part,
                                    "engine": dict(job.engine)}))
        return self._begin(["run", str(path), *words])

    def _begin(self, words: list[str]) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-m", "tests.jobs.run_fake_command", *words], cwd=REPOSITORY, env=self._environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def _wait_for_cpu(self, process: subprocess.Popen, seconds: float) -> None:
        while process.poll() is None and cpu_seconds(process) < seconds:
            time.sleep(0.001)
        time.sleep(self._draw.uniform(0, 0.01))  # the kernel counts in hundredths

    def _wait_for_rows(self, process: subprocess.Popen, num_rows: int) -> None:
        while process.poll() is None and num_rows and len(self._calls.read_text().splitlines()) < num_rows:
            time.sleep(0.001)
        time.sleep(self._draw.uniform(0, 0.03) if num_rows else 0)

    def _send(self, process: subprocess.Popen, number: signal.Signals, kind: str) -> int:
        """Send a signal; the exit code, which must be right."""
        process.send_signal(number)
        code, errors = self._end(process)
        where = f"{kind}: {number.name}: exit code {code}\n{errors}"
        # Before the interpreter comes to our first line it does what it does with any program.
        is_python = code == -number or (code == 1 and "Fatal Python error: init_import_site" in errors)
        assert code in (0, 128 + number) or is_python, where
        assert is_python or "Traceback" not in errors, where
        self.outcomes[kind, number.name, "before our first line" if is_python and number != signal.SIGKILL else code] += 1
        return code

    @staticmethod
    def _end(process: subprocess.Popen) -> tuple[int, str]:
        _, errors = process.communicate(timeout=PATIENCE_S)
        return process.returncode, errors


def cpu_seconds(process: subprocess.Popen) -> float:
    """That a process took so far; none once it has ended."""
    try:
        times = psutil.Process(process.pid).cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


@pytest.mark.slow
def test_a_signal_at_any_moment_loses_nothing_doubles_nothing_and_has_its_exit_code(tmp_path):
    num_moments = int(os.environ.get("TPLLM_SIGNAL_MOMENTS", "15"))
    draw = random.Random(int(os.environ.get("TPLLM_SIGNAL_SEED", "20261130")))
    trials = Trials(tmp_path, draw, imports_all=num_moments > 15)
    kinds = [trials.startup, trials.run, trials.merge, trials.resume, trials.dry_run]
    for trial in range(num_moments):
        kinds[trial % len(kinds)](SIGNALS[trial // len(kinds) % len(SIGNALS)])
    for (kind, name, code), count in sorted(trials.outcomes.items(), key=str):
        print(f"{kind}: {name}: exit code {code}: {count} times")
    assert sum(trials.outcomes.values()) == num_moments
