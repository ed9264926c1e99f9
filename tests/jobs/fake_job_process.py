"""A job in its own process, on the fake engine, from its start to the moment a test chooses."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from tests.jobs.fake_llm import FakeLLM
from tpllm.jobs.config import JobConfig

REPOSITORY = pathlib.Path(__file__).parents[2]
PATIENCE_S = 60


class NoSleepLLM(FakeLLM):
    """The same engine without its pauses, to finish a job quickly."""

    def __init__(self, model, *, max_num_seqs=4, tick_s=0.0, calls=None, **options):
        super().__init__(model, max_num_seqs=max_num_seqs, calls=calls, **options)


def start(job: JobConfig) -> subprocess.Popen:
    """Start ``tpllm run`` on a job; returns when its manifest is there and the engine runs."""
    path = pathlib.Path(job.work_dir or job.output).with_suffix(".yaml")
    path.write_text(json.dumps({"model": job.model, "input": job.input, "output": job.output, "work_dir": job.work_dir,
                                "output_format": job.output_format, "rows_per_part": job.rows_per_part,
                                "engine": dict(job.engine)}))
    command = [sys.executable, "-m", "tests.jobs.run_fake_job", str(path), *(["--shard", job.shard] if job.shard else [])]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()  # the progress's first line follows the manifest
    assert "rows" in line, line + process.stderr.read()
    return process


def wait_for(condition, process: subprocess.Popen) -> None:
    """Poll until ``condition()`` holds while the process runs."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill(process: subprocess.Popen) -> None:
    """``kill -9``."""
    os.kill(process.pid, signal.SIGKILL)
    end(process)


def end(process: subprocess.Popen) -> int:
    """Wait for a process and close its pipe; its exit code."""
    process.communicate(timeout=PATIENCE_S)
    return process.returncode
