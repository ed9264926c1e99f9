"""One file of a job's folder is damaged at random: every command says so or is right, and no row is wrong unless ``--verify`` tells."""
import contextlib
import pathlib
import random
import shutil

import pytest

from tests.jobs.fake_llm import DyingLLM, FakeLLM
from tests.jobs.small_job import contents, rows_text
from tpllm.errors import JobError
from tpllm.jobs.dry_run.run import finished_rows
from tpllm.jobs.merge import merge_shards
from tpllm.jobs.outputs.folder import read_manifest
from tpllm.jobs.runner import run_job
from tpllm.jobs.shard import Parts
from tpllm.jobs.status import job_status

NUM_ROWS, NUM_TRIALS = 11, 40
TEXT = rows_text(NUM_ROWS, bad=(1, 7))


def flip(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + draw.randbytes(1) + data[place + 1:]


def without_a_line(data: bytes, draw: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    lines.pop(draw.randrange(len(lines)))
    return b"".join(lines)


DAMAGE = (flip, flip, without_a_line, lambda data, draw: data[:draw.randrange(len(data))], lambda data, draw: data + data,
          lambda data, draw: data + draw.randbytes(9), lambda data, draw: bytes(len(data)))


def parts_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.startswith("part-")}


def damage_one(folder: pathlib.Path, draw: random.Random) -> str:
    path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size))
    path.write_bytes(draw.choice(DAMAGE)(path.read_bytes(), draw))
    return path.name


class Dies(DyingLLM):
    num_outputs = 6


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_job_goes_on_rightly_or_says_what_is_damaged(make_job, is_complete):
    job = make_job(TEXT)
    run_job(make_job(TEXT, output="whole"), make_llm=FakeLLM)
    with contextlib.nullcontext() if is_complete else pytest.raises(RuntimeError):
        run_job(job, make_llm=FakeLLM if is_complete else Dies)
    folder, draw, outcomes = pathlib.Path(job.output), random.Random(5), set()
    wanted = parts_of(folder.parent / "whole")
    shutil.copytree(folder, folder.parent / "sound")
    for _ in range(NUM_TRIALS):
        name = damage_one(folder, draw)
        damaged = contents(folder)
        job_status(job.output, counts_tokens=True, verifies=True)
        with contextlib.suppress(JobError):
            finished_rows(folder, Parts(NUM_ROWS, job.rows_per_part), read_manifest(folder))
        try:
            assert run_job(job, make_llm=FakeLLM).is_complete
            is_told = bool(job_status(job.output, verifies=True).together.problems)
            assert parts_of(folder) == wanted or is_told, name
            outcomes.add("told by --verify" if is_told else "right")
        except JobError:
            assert parts_of(folder).items() >= {item for item in damaged.items() if item[0].startswith("part-")}, name
            outcomes.add("refused")
        shutil.rmtree(folder)
        shutil.copytree(folder.parent / "sound", folder)
    assert {"refused", "right"} <= outcomes


def test_a_merge_is_right_or_refused(make_job):
    shards = [make_job(TEXT, shard=f"{index}/2") for index in range(2)]
    for shard in (make_job(TEXT, output="whole"), *shards):
        run_job(shard, make_llm=FakeLLM)
    folder, draw, num_merged = pathlib.Path(shards[0].output), random.Random(6), 0
    wanted = parts_of(folder.parent / "whole")
    shutil.copytree(folder, folder.parent / "sound")
    for _ in range(NUM_TRIALS):
        damage_one(folder, draw)
        with contextlib.suppress(JobError):
            merge_shards(str(folder))
            num_merged += 1
            assert parts_of(folder) == wanted
        shutil.rmtree(folder)
        shutil.copytree(folder.parent / "sound", folder)
    assert 0 < num_merged < NUM_TRIALS
