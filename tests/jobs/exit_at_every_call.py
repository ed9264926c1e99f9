"""For tests: run one job again and again, ending the process at every disk call in turn; after each, a new process must finish it.

``exit_at_every_call.py INPUT FOLDER`` prints how many ends there were. It forks, so it must stay free of threads.
"""
import itertools
import os
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import tpllm.jobs.outputs.parquet_parts  # or each child would import it again
import tpllm.jobs.sources.parquet  # noqa: F401
from tests.jobs.fake_llm import FakeLLM
from tests.jobs.faulty_disk import MOMENTS, FaultyDisk, QuickDisk
from tests.jobs.small_job import contents
from tpllm.jobs.config import JobConfig
from tpllm.jobs.outputs.durable import Disk
from tpllm.jobs.runner import run_job

DIED = 77


def in_a_child(work: Callable[[], Any]) -> int:
    """Do something in a child; its exit code: 0 where the result is true, 2 where it is not, 1 after an error."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_a_process(job: JobConfig, disk: Disk, **options: Any) -> int:
    """Run the job in a child; its exit code."""
    return in_a_child(lambda: run_job(job, make_llm=FakeLLM, disk=disk, sync_interval_s=0, **options).is_complete)


def main(input_path: str, folder: str) -> None:
    """End the process at every call, up to the first call number that the job does not reach."""
    sys.stderr = open(os.devnull, "w")
    job = JobConfig(model="fake", input=input_path, output=folder, rows_per_part=3, engine={"max_num_seqs": 3})
    assert in_a_process(job, QuickDisk()) == 0
    wanted = contents(pathlib.Path(folder))
    num_ends = 0
    for moment in MOMENTS:
        for number in itertools.count():
            shutil.rmtree(folder)
            code = in_a_process(job, FaultyDisk(number, moment, lambda: os._exit(DIED)))
            assert code in (0, DIED), (number, moment, code)
            assert in_a_process(job, QuickDisk()) == 0, (number, moment)
            assert contents(pathlib.Path(folder)) == wanted, (number, moment)
            if code == 0:
                break
            num_ends += 1
    print(num_ends)


if __name__ == "__main__":
    main(*sys.argv[1:])
