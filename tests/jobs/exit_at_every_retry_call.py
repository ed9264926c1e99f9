"""For tests: retry a job's failed rows again and again, ending the process at every disk call in turn; after each, a new process must finish it.

``exit_at_every_retry_call.py INPUT FOLDER FORMAT`` prints how many ends there were. It forks, so it must stay free of threads.
"""
import itertools
import os
import pathlib
import shutil
import sys

import tpllm.jobs.outputs.parquet_parts  # or each child would import it again
import tpllm.jobs.sources.parquet  # noqa: F401
from tests.jobs.exit_at_every_call import DIED, in_a_process
from tests.jobs.fake_llm import FailingLLM, FakeLLM
from tests.jobs.faulty_disk import MOMENTS, FaultyDisk, QuickDisk
from tests.jobs.small_job import contents
from tpllm.jobs.config import JobConfig
from tpllm.jobs.runner import run_job


def parts(folder: str) -> dict[str, bytes]:
    """The files of a folder but the manifest, which tells how often rows were retried."""
    return {name: data for name, data in contents(pathlib.Path(folder)).items() if name != "manifest.json"}


def main(input_path: str, folder: str, output_format: str) -> None:
    """End the process at every call, up to the first call number that the retry does not reach."""
    sys.stderr = open(os.devnull, "w")
    job = JobConfig(model="fake", input=input_path, output=folder, rows_per_part=3, engine={"max_num_seqs": 3}, output_format=output_format)
    run_job(job, make_llm=FailingLLM, disk=QuickDisk(), sync_interval_s=0)
    shutil.move(folder, folder + "-failed")
    run_job(job, make_llm=FakeLLM, disk=QuickDisk(), sync_interval_s=0)
    wanted, num_ends = parts(folder), 0
    for moment, by_run in (("after", True), *itertools.product(MOMENTS if output_format == "jsonl" else (), (False,))):
        for number in itertools.count():
            shutil.rmtree(folder)
            shutil.copytree(folder + "-failed", folder)
            code = in_a_process(job, FaultyDisk(number, moment, lambda: os._exit(DIED)), retries_failed=True)
            assert code in (0, DIED), (number, moment, code)
            if by_run:  # which loses nothing, and leaves it to a retry to run again what failed
                assert in_a_process(job, QuickDisk()) == 0, (number, moment)
            assert in_a_process(job, QuickDisk(), retries_failed=True) == 0, (number, moment)
            assert parts(folder) == wanted, (number, moment)
            if code == 0:
                break
            num_ends += 1
    print(num_ends)


if __name__ == "__main__":
    main(*sys.argv[1:])
