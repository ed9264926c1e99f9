"""A job that ends at any disk call, in any way, is finished by the next run as if nothing had happened."""
import errno
import itertools
import pathlib
import random
import subprocess
import sys

import pytest

from tests.jobs.fake_llm import FailingLLM, FakeLLM
from tests.jobs.faulty_disk import MOMENTS, Death, FaultyDisk, PowerLossDisk, QuickDisk
from tests.jobs.small_job import all_errors, all_rows, contents, rows_text
from tpllm.errors import JobError
from tpllm.jobs.outputs.part_files import PART_NAME
from tpllm.jobs.runner import run_job

REPOSITORY = pathlib.Path(__file__).parents[2]
TEXT = rows_text(11, bad=(1, 7))


LEAST_CALLS = {"before": 60, "half": 15, "after": 60}


def no_space():
    raise OSError(errno.ENOSPC, "No space left on device")


def run_until_power_is_lost(job, disk):
    try:
        run_job(job, make_llm=FakeLLM, disk=disk, sync_interval_s=0)
    except Death:
        disk.lose_power(pathlib.Path(job.output))


def finish(job, wanted):
    assert run_job(job, make_llm=FakeLLM, disk=QuickDisk()).is_complete
    assert contents(pathlib.Path(job.output)) == wanted


@pytest.fixture
def wanted(run_text):
    """The folder of the same job, never interrupted."""
    return contents(run_text(TEXT, output="uninterrupted"))


def test_a_process_that_exits_at_any_disk_call_is_resumed_byte_for_byte(tmp_path):
    (tmp_path / "rows.jsonl").write_text(TEXT)
    command = [sys.executable, "-m", "tests.jobs.exit_at_every_call", str(tmp_path / "rows.jsonl"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > sum(LEAST_CALLS.values())


@pytest.mark.parametrize("output_format", ["jsonl", "parquet"])
def test_a_retry_that_exits_at_any_disk_call_is_resumed_byte_for_byte(tmp_path, output_format):
    (tmp_path / "rows.jsonl").write_text(rows_text(5, bad=(1,)))
    command = [sys.executable, "-m", "tests.jobs.exit_at_every_retry_call", str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), output_format]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > (90 if output_format == "jsonl" else 30)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_loss_of_power_while_rows_are_retried_at_any_disk_call_is_resumed_byte_for_byte(make_job, run_text, moment):
    text = rows_text(5, bad=(1,))
    wanted = contents(run_text(text, output="uninterrupted"))
    for number in itertools.count():
        job, disk = make_job(text, output=f"out-{number}"), PowerLossDisk(number, moment)
        folder = pathlib.Path(job.output)
        run_job(job, make_llm=FailingLLM, disk=QuickDisk())
        try:
            run_job(job, make_llm=FakeLLM, disk=disk, sync_interval_s=0, retries_failed=True)
        except Death:
            disk.lose_power(folder)
        assert run_job(job, make_llm=FakeLLM, disk=QuickDisk(), retries_failed=True).is_complete
        assert {**contents(folder), "manifest.json": b""} == {**wanted, "manifest.json": b""}, number
        if not disk.has_struck:
            break
    assert number > LEAST_CALLS[moment] / 2


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_loss_of_power_at_at_any_disk_call_is_resumed_byte_for_byte(make_job, wanted, moment):
    for number in itertools.count():
        job = make_job(TEXT, output=f"out-{number}")
        disk = PowerLossDisk(number, moment)
        run_until_power_is_lost(job, disk)
        finish(job, wanted)
        if not disk.has_struck:
            break
    assert number > LEAST_CALLS[moment]


@pytest.mark.parametrize("seed", range(20))
def test_power_lost_again_and_again_also_while_resuming_ends_in_the_same_bytes(make_job, wanted, seed):
    draw = random.Random(seed)
    job = make_job(TEXT)
    for _ in range(6):
        run_until_power_is_lost(job, PowerLossDisk(draw.randrange(30), draw.choice(MOMENTS)))
    finish(job, wanted)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_at_any_call_is_one_clear_error_and_loses_nothing(make_job, wanted, moment):
    for number in itertools.count():
        job = make_job(TEXT, output=f"out-{number}")
        disk = FaultyDisk(number, moment, no_space, is_mortal=False)
        try:
            run_job(job, make_llm=FakeLLM, disk=disk, sync_interval_s=0)
        except JobError as caught:
            error = str(caught)
        if not disk.has_struck:
            break
        assert "cannot write to the output folder" in error
        assert "No space left" in error
        committed = {name: data for name, data in contents(pathlib.Path(job.output)).items() if PART_NAME.fullmatch(name)}
        finish(job, wanted)
        assert committed.items() <= contents(pathlib.Path(job.output)).items()
        del error
    assert number > LEAST_CALLS[moment]


def test_a_sync_that_fails_in_the_background_stops_the_job(make_job):
    class NoSync(QuickDisk):
        def sync(self, fd):
            no_space()
    job = make_job(rows_text(50), engine={"tick_s": 0.02}, rows_per_part=50)
    with pytest.raises(JobError, match="No space left"):
        run_job(job, make_llm=FakeLLM, disk=NoSync(), sync_interval_s=0.01)


@pytest.mark.parametrize("sync_interval_s", [0, 3600])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_row_that_fails_in_one_run_only_is_still_there_exactly_once(make_job, moment, sync_interval_s):
    for number in itertools.count():
        job = make_job(rows_text(11), output=f"out-{number}")
        folder, disk = pathlib.Path(job.output), PowerLossDisk(number, moment)
        try:
            run_job(job, make_llm=FailingLLM, disk=disk, sync_interval_s=sync_interval_s)
        except Death:
            disk.lose_power(folder)
        assert run_job(job, make_llm=FakeLLM, disk=QuickDisk()).is_complete
        ids = [row["custom_id"] for row in all_rows(folder) + all_errors(folder)]
        assert sorted(ids) == sorted(f"id-{i}" if i % 3 == 1 else str(i) for i in range(11)), number
        assert not list(folder.glob("*.tmp"))
        if not disk.has_struck:
            break
    assert number > 15
