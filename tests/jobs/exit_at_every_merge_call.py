"""For tests: merge two shards again and again, ending the process at every disk call in turn; after each, a new process must finish it.

``exit_at_every_merge_call.py INPUT FOLDER`` prints how many ends there were. It forks, so it must stay free of threads.
"""
import itertools
import os
import pathlib
import shutil
import sys

from tests.jobs.exit_at_every_call import DIED, in_a_child, in_a_process
from tests.jobs.fake_llm import FakeLLM
from tests.jobs.faulty_disk import MOMENTS, FaultyDisk, QuickDisk
from tests.jobs.small_job import contents
from tpllm.jobs.config import JobConfig
from tpllm.jobs.merge import merge_shards
from tpllm.jobs.outputs.durable import Disk
from tpllm.jobs.runner import run_job


def merge_in_a_process(output: pathlib.Path, shards: list[str], disk: Disk) -> int:
    """Merge in a child; its exit code."""
    return in_a_child(lambda: merge_shards(str(output), shards, disk=disk) or True)


def main(input_path: str, folder: str) -> None:
    """End the process at every call, up to the first call number that the merge does not reach."""
    sys.stderr = open(os.devnull, "w")

    def job(output: str, shard: str | None = None) -> JobConfig:
        return JobConfig(model="fake", input=input_path, output=str(pathlib.Path(folder) / output), shard=shard, rows_per_part=3)
    assert in_a_process(job("whole"), QuickDisk()) == 0
    shards = [job("shards", f"{index}/2") for index in range(2)]
    assert all(in_a_process(shard, QuickDisk()) == 0 for shard in shards)
    wanted, before = contents(pathlib.Path(folder) / "whole"), [contents(pathlib.Path(shard.folder)) for shard in shards]
    output, num_ends = pathlib.Path(folder) / "merged", 0
    for moment, by_unsharded in itertools.product(MOMENTS, (False, True)):
        for number in itertools.count():
            shutil.rmtree(output, ignore_errors=True)
            code = merge_in_a_process(output, [shard.folder for shard in shards], FaultyDisk(number, moment, lambda: os._exit(DIED)))
            assert code in (0, DIED), (number, moment, code)
            if by_unsharded:
                assert run_job(job("merged"), make_llm=FakeLLM, disk=QuickDisk(), sync_interval_s=0).is_complete
            else:
                assert merge_in_a_process(output, [shard.folder for shard in shards], QuickDisk()) == 0, (number, moment)
            assert contents(output) == wanted, (number, moment)
            assert [contents(pathlib.Path(shard.folder)) for shard in shards] == before, (number, moment)
            if code == 0:
                break
            num_ends += 1
    print(num_ends)


if __name__ == "__main__":
    main(*sys.argv[1:])
