"""``job_status`` says what a folder holds, while the job runs, after it, and when the folder is damaged; it changes nothing."""
import json
import os
import pathlib

import pytest

from tests.jobs.fake_job_process import kill, start, wait_for
from tests.jobs.fake_llm import FakeLLM
from tests.jobs.small_job import all_rows, rows_text
from tpllm.cli.main import main
from tpllm.errors import JobError
from tpllm.jobs.merge import merge_shards
from tpllm.jobs.outputs.lock import held_for_reading, held_for_writing, writer_of
from tpllm.jobs.runner import run_job
from tpllm.jobs.status import job_status

TEXT = rows_text(11, bad=(1, 7))


class Dies(FakeLLM):
    """Gives five rows, then fails."""

    def generate_iter(self, *arguments, **options):
        for number, output in enumerate(super().generate_iter(*arguments, **options)):
            if number == 5:
                raise RuntimeError("the engine is gone")
            yield output


@pytest.fixture
def half_done(make_job):
    job = make_job(TEXT)
    with pytest.raises(RuntimeError, match="the engine is gone"):
        run_job(job, make_llm=Dies)
    return job


def snapshot(folder: pathlib.Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_complete_job_is_counted(run_text):
    folder = run_text(TEXT)
    status = job_status(str(folder), counts_tokens=True).together
    assert (status.num_done, status.num_failed, status.num_in_journals, status.num_committed, status.pid) == (11, 2, 0, 4, None)
    assert status.is_complete
    assert status.problems == []
    rows = all_rows(folder)
    assert status.prompt_tokens == sum(row["usage"]["prompt_tokens"] for row in rows) > 0
    assert status.completion_tokens == sum(row["usage"]["completion_tokens"] for row in rows) > 0


def test_tokens_are_not_counted_unless_asked_for(run_text):
    assert job_status(str(run_text(TEXT))).together.prompt_tokens is None


def test_a_job_that_was_interrupted_is_counted_with_its_journals_and_nothing_changes(half_done):
    folder = pathlib.Path(half_done.output)
    before = snapshot(folder)
    status = job_status(half_done.output, counts_tokens=True).together
    committed = [json.loads(line) for path in folder.glob("part-?????.jsonl") for line in path.read_text().splitlines()]
    journalled = [line for path in folder.glob("journal-*") for line in path.read_bytes().splitlines()]
    errors = [line for line in journalled if b" error " in line[:30]]
    num_part_errors = sum(len(path.read_bytes().splitlines()) for path in folder.glob("part-*.errors.jsonl"))
    assert status.num_in_journals == len(journalled) > 0
    assert status.num_done == len(journalled) + len(committed) + num_part_errors
    assert status.num_failed == len(errors) + num_part_errors
    assert status.prompt_tokens == 3 * (status.num_done - status.num_failed)  # the fake engine's prompts have three
    assert not status.is_complete
    assert snapshot(folder) == before


def test_a_running_job_is_named_with_its_pid_and_goes_on(make_job):
    job = make_job(rows_text(30), engine={"max_num_seqs": 3, "tick_s": 0.05})
    process = start(job)
    folder = pathlib.Path(job.output)
    wait_for(lambda: (folder / "part-00000.jsonl").exists(), process)
    for _ in range(20):
        status = job_status(job.output)
        assert status.together.problems == []
        assert 3 <= status.together.num_done <= 30
    assert status.together.pid == process.pid
    kill(process)
    assert job_status(job.output).together.pid is None


def test_asking_for_the_writer_keeps_nobody_from_writing(tmp_path):
    assert writer_of(tmp_path) is None
    with held_for_writing(tmp_path):
        assert writer_of(tmp_path) == os.getpid()
    assert writer_of(tmp_path) is None
    with held_for_reading(tmp_path):
        assert writer_of(tmp_path) is None
        with pytest.raises(JobError, match="another process"), held_for_writing(tmp_path):
            pass
    with held_for_writing(tmp_path), pytest.raises(JobError, match=r"\(pid \d+\) is running the job"), held_for_reading(tmp_path):
        pass


def test_a_lock_that_is_held_for_a_moment_only_is_waited_for(tmp_path, monkeypatch):
    asker = held_for_reading(tmp_path)
    (tmp_path / ".lock").touch()
    asker.__enter__()
    monkeypatch.setattr("time.sleep", lambda seconds: asker.__exit__(None, None, None))
    with held_for_writing(tmp_path):
        assert writer_of(tmp_path) == os.getpid()


def test_shards_are_counted_each_and_together(make_job):
    jobs = [make_job(TEXT, shard=f"{index}/4") for index in range(4)]
    run_job(jobs[0], make_llm=FakeLLM)
    with pytest.raises(RuntimeError):
        run_job(jobs[2], make_llm=type("Two", (Dies,), {"generate_iter": lambda self, *a, **k: _first(FakeLLM.generate_iter(self, *a, **k), 1)}))
    status = job_status(jobs[0].output)
    assert [str(shard) for shard in status.missing] == ["1/4", "3/4"]
    assert [(shard.num_done, shard.parts.num_rows, shard.is_complete) for shard in status.shards] == [(3, 3, True), (2, 3, False)]
    assert (status.together.num_done, status.together.parts.num_rows, status.together.num_committed) == (5, 11, 1)
    assert not status.together.is_complete
    for job in jobs[1:]:
        run_job(job, make_llm=FakeLLM)
    assert job_status(jobs[0].output).together.is_complete
    assert job_status(jobs[0].output).whole is None
    merge_shards(jobs[0].output)
    merged = job_status(jobs[0].output)
    assert merged.whole.is_complete
    assert merged.together is merged.whole


def _first(outputs, number):
    for index, output in enumerate(outputs):
        if index == number:
            raise RuntimeError("the engine is gone")
        yield output


@pytest.mark.parametrize("damage", ["torn", "{}", None])
def test_a_damaged_manifest_is_said_and_the_rows_are_counted_all_the_same(half_done, damage):
    whole = job_status(half_done.output).together
    path = pathlib.Path(half_done.output) / "manifest.json"
    path.unlink() if damage is None else path.write_text(damage)
    status = job_status(half_done.output).together
    assert status.parts is None
    assert not status.is_complete
    assert "manifest" in status.problems[0]
    assert (status.num_done, status.num_failed, status.num_committed) == (whole.num_done, whole.num_failed, whole.num_committed)


def test_damaged_lines_of_a_journal_are_said_and_not_counted(half_done):
    folder = pathlib.Path(half_done.output)
    path = next(folder.glob("journal-*"))
    before = job_status(half_done.output).together.num_in_journals
    path.write_bytes(path.read_bytes()[:-3])
    status = job_status(half_done.output).together
    assert status.num_in_journals == before - 1
    assert f"{path.name} has 1 torn or damaged lines" in status.problems[0]


def test_a_part_that_is_there_twice_is_said(run_text):
    folder = run_text(TEXT)
    (folder / "part-00001.parquet").write_bytes(b"")
    assert "part 1 is there twice" in job_status(str(folder)).together.problems[0]


def test_parts_of_another_job_are_said_and_not_counted(run_text):
    folder = run_text(TEXT)
    (folder / "part-00009.jsonl").write_text("{}\n")
    status = job_status(str(folder)).together
    assert status.is_complete
    assert "1 parts do not belong to the job" in status.problems[0]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_what_holds_no_job_is_refused(tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises(JobError, match=r"out.*"):
        job_status(str(tmp_path / "out"))


def test_the_command_prints_a_table_and_the_problems(half_done, capsys):
    path = next(pathlib.Path(half_done.output).glob("journal-*"))
    path.write_bytes(path.read_bytes() + b"torn")
    assert main(["job", "status", half_done.output, "--tokens"]) == 0
    lines = capsys.readouterr().out.splitlines()
    status = job_status(half_done.output).together
    assert lines[0].split() == ["rows", "failed", "in", "journals", "parts", "state"]
    assert lines[1].split() == ["job", f"{status.num_done}/11", str(status.num_failed), str(status.num_in_journals), f"{status.num_committed}/4",
                                "incomplete"]
    assert lines[2].startswith("tokens: ")
    assert "torn or damaged" in lines[3]


def test_the_command_shows_each_shard_and_what_to_do_next(make_job, capsys):
    for index in range(2):
        run_job(make_job(TEXT, shard=f"{index}/3"), make_llm=FakeLLM)
    output = make_job(TEXT).output
    assert main(["job", "status", output]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["shard", "0/3"], ["shard", "1/3"], ["shard", "2/3"]]
    assert lines[3].endswith("not begun")
    assert lines[4].split()[0] == "together"
    run_job(make_job(TEXT, shard="2/3"), make_llm=FakeLLM)
    assert main(["job", "status", output]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"tpllm job merge {output}")


def test_the_command_prints_json(half_done, capsys):
    assert main(["job", "status", half_done.output, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["is_complete"] is False
    assert status["together"]["num_rows"] == 11
    assert status["together"]["num_done"] == job_status(half_done.output).together.num_done
    assert status["shards"] == status["missing_shards"] == []


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    assert main(["job", "status", str(tmp_path / "none")]) == 2
    assert main(["job", "merge", str(tmp_path / "none")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
