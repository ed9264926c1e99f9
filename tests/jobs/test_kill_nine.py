"""``kill -9`` at any moment: every row exactly once, byte for byte as in a run that nobody killed."""
import pathlib
import random
import time

import pytest

from tests.jobs.fake_job_process import NoSleepLLM, end, kill, start
from tests.jobs.small_job import contents, rows_text
from tpllm.jobs.outputs.part_files import PART_NAME
from tpllm.jobs.runner import run_job

NUM_ROWS, ROWS_PER_PART, MAX_NUM_SEQS = 60, 4, 4
NUM_PARTS = NUM_ROWS // ROWS_PER_PART
TEXT = rows_text(NUM_ROWS, bad=(9, 30, 31))
NUM_BAD = 3


def num_committed(folder: pathlib.Path) -> int:
    return sum(1 for path in folder.iterdir() if PART_NAME.fullmatch(path.name))


@pytest.mark.parametrize(("num_kills", "least_between"), [(4, 0), pytest.param(10, 5, marks=pytest.mark.slow)])
def test_a_job_killed_at_random_moments_ends_as_if_it_had_not_been(make_job, tmp_path, num_kills, least_between):
    calls = tmp_path / "calls"
    engine = {"max_num_seqs": MAX_NUM_SEQS, "tick_s": 0.01, "calls": str(calls)}
    whole = make_job(TEXT, output="whole", rows_per_part=ROWS_PER_PART, engine=engine)
    process, started = start(whole), time.monotonic()
    assert end(process) == 0
    duration = time.monotonic() - started
    wanted = contents(pathlib.Path(whole.output))
    draw, num_between = random.Random(20261120), 0
    for number in range(num_kills):
        job = make_job(TEXT, output=f"killed-{number}", rows_per_part=ROWS_PER_PART, engine=engine)
        folder = pathlib.Path(job.output)
        calls.write_text("")
        moments = [draw.uniform(0, duration) for _ in range(draw.choice((1, 1, 2)))]
        for index, moment in enumerate(moments):
            process = start(job)
            time.sleep(moment)
            kill(process)
            num_between += index == 0 and 0 < num_committed(folder) < NUM_PARTS
            if num_committed(folder) == NUM_PARTS:
                break
        where = f"kill {number}: after {moments} s, {num_committed(folder)} parts committed"
        assert run_job(job, make_llm=NoSleepLLM).is_complete, where
        assert contents(folder) == wanted, where
        num_redone = len(calls.read_text().splitlines()) - (NUM_ROWS - NUM_BAD)
        assert num_redone <= MAX_NUM_SEQS * len(moments), where
    assert num_between >= least_between
