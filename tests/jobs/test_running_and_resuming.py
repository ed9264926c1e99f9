"""A folder belongs to one job, one process, and one environment; a rerun does only what is missing."""
import dataclasses
import json
import os
import pathlib

import psutil
import pytest

from tests.jobs import fake_llm
from tests.jobs.fake_llm import FakeLLM
from tests.jobs.small_job import all_rows, contents, rows_text
from tpllm.errors import JobError
from tpllm.jobs.outputs.durable import Disk
from tpllm.jobs.outputs.folder import opened_output
from tpllm.jobs.runner import run_job

TEXT = rows_text(11)


class Dies(FakeLLM):
    """Gives ``num_before_death`` rows, then fails as no engine should."""

    num_before_death = 7

    def generate_iter(self, *arguments, **options):
        for number, output in enumerate(super().generate_iter(*arguments, **options)):
            if number == self.num_before_death:
                raise RuntimeError("the engine is gone")
            yield output


class NeverMade(FakeLLM):
    def __init__(self, *_, max_num_seqs=4, **__):
        raise AssertionError("no model is needed")


@pytest.fixture
def half_done(make_job):
    job = make_job(TEXT)
    with pytest.raises(RuntimeError, match="the engine is gone"):
        run_job(job, make_llm=Dies)
    return job


def test_a_rerun_runs_only_the_rows_that_are_missing(half_done, make_job, run_text, tmp_path):
    folder = pathlib.Path(half_done.output)
    before = contents(folder)
    log = tmp_path / "calls"

    class Logged(FakeLLM):
        def __init__(self, model, *, max_num_seqs=4, **options):
            super().__init__(model, max_num_seqs=max_num_seqs, calls=log, **options)
    result = run_job(half_done, make_llm=Logged)
    assert (result.num_rows, result.num_done, result.num_new, result.is_complete) == (11, 11, 4, True)
    assert len(log.read_text().splitlines()) == 4
    after = contents(folder)
    committed = {name: data for name, data in before.items() if name.startswith("part-")}
    assert committed
    assert committed.items() <= after.items()
    assert after == contents(run_text(TEXT, output="uninterrupted"))


def test_a_complete_job_says_so_and_loads_no_model(make_job):
    job = make_job(TEXT)
    run_job(job, make_llm=FakeLLM)
    before = contents(pathlib.Path(job.output))
    result = run_job(job, make_llm=NeverMade)
    assert (result.num_done, result.num_new) == (11, 0)
    assert result.is_complete
    assert contents(pathlib.Path(job.output)) == before


def test_rows_depend_on_nothing_but_themselves(run_text):
    one = all_rows(run_text(TEXT))
    for number, keys in enumerate(({"rows_per_part": 1}, {"rows_per_part": 100}, {"engine": {"max_num_seqs": 1}}, {"engine": {"max_num_seqs": 9}})):
        assert all_rows(run_text(TEXT, output=f"out-{number}", **keys)) == one


@pytest.mark.parametrize(("changes", "message"), [
    ({"sampling": {"max_tokens": 3}}, r"sampling.max_tokens was \(absent\) and is now 3"),
    ({"seed": 1}, r"seed was 0 and is now 1"),
    ({"model": "other"}, r"model was 'fake' and is now 'other'"),
    ({"rows_per_part": 4}, r"rows_per_part was 3 and is now 4"),
    ({"dtype": "float32"}, r"dtype was 'auto' and is now 'float32'"),
    ({"engine": {"max_num_seqs": 3, "max_model_len": 64}}, r"engine.max_model_len was \(absent\) and is now 64"),
    ({"seed": 1, "dtype": "x"}, r"dtype was 'auto' and is now 'x'; seed was 0 and is now 1"),
])
@pytest.mark.parametrize("is_allowed", [False, True])
def test_a_changed_job_over_an_old_output_is_refused_with_the_difference(half_done, changes, message, is_allowed):
    before = contents(pathlib.Path(half_done.output))
    changed = dataclasses.replace(half_done, **changes, allow_environment_change=is_allowed)
    with pytest.raises(JobError, match=r"belongs to another job: " + message + r"; give this job another output"):
        run_job(changed, make_llm=NeverMade if "engine" not in changes else FakeLLM)
    assert contents(pathlib.Path(half_done.output)) == before


def test_another_input_over_an_old_output_is_refused(half_done):
    pathlib.Path(half_done.input).write_text(TEXT.replace("p3", "p4"))
    with pytest.raises(JobError, match=r"input.files.0.sha256 was '[0-9a-f]{64}' and is now"):
        run_job(half_done, make_llm=NeverMade)


def test_the_same_input_under_another_name_is_the_same_job(half_done, tmp_path):
    moved = pathlib.Path(half_done.input).rename(tmp_path / "moved.jsonl")
    assert run_job(dataclasses.replace(half_done, input=str(moved)), make_llm=FakeLLM).is_complete


def test_other_weights_under_the_same_name_are_refused_even_when_the_environment_may_change(half_done):
    class Retrained(FakeLLM):
        def fingerprint(self):
            return {**super().fingerprint(), "model": {"name": "fake", "sha256": "1" * 8}}
    with pytest.raises(JobError, match=r"belongs to another job: model.sha256 was '00000000' and is now '11111111'"):
        run_job(dataclasses.replace(half_done, allow_environment_change=True), make_llm=Retrained)


@pytest.mark.parametrize("change", [{"engine": {"max_num_seqs": 2}}, {"mesh": "tp=2"}, {}])
def test_another_environment_is_refused_unless_allowed_and_then_recorded(half_done, monkeypatch, change, run_text):
    monkeypatch.setitem(fake_llm.VERSIONS, "jax", "0.0-fake" if change else "9.9")
    changed = dataclasses.replace(half_done, **change)
    key = "engine.max_num_seqs was 3 and is now 2" if "engine" in change else "mesh was" if change else "jax was '0.0-fake' and is now '9.9'"
    with pytest.raises(JobError, match=rf"begun in another environment: .*{key}.*--allow-environment-change"):
        run_job(changed, make_llm=FakeLLM)
    allowed = dataclasses.replace(changed, allow_environment_change=True)
    assert run_job(allowed, make_llm=FakeLLM).is_complete
    folder = pathlib.Path(half_done.output)
    record, = json.loads((folder / "manifest.json").read_text())["environment_changes"]
    assert record["num_rows_done"] == 7
    assert record["changes"]
    assert all_rows(folder) == all_rows(run_text(TEXT, output="uninterrupted"))
    assert run_job(changed, make_llm=NeverMade if "engine" not in change else FakeLLM).num_new == 0


def test_two_processes_cannot_run_one_output(make_job):
    job = make_job(TEXT)
    with opened_output(pathlib.Path(job.output), Disk()), pytest.raises(JobError, match=r"another process \(pid \d+\) is running the job in"):
        run_job(job, make_llm=FakeLLM)
    assert run_job(job, make_llm=FakeLLM).is_complete


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_an_output_that_cannot_be_made_is_refused(make_job, tmp_path, below):
    (tmp_path / "a-file").write_text("x")
    job = dataclasses.replace(make_job(TEXT), output=str(tmp_path / "a-file") + below)
    with pytest.raises(JobError, match=r"cannot write to the output folder .*a-file"):
        run_job(job, make_llm=NeverMade)
    assert (tmp_path / "a-file").read_text() == "x"


def test_an_output_that_may_not_be_written_is_refused(make_job, monkeypatch):
    real = os.open

    def refusing(path, flags, *rest, **options):
        if flags & os.O_CREAT and str(path).endswith(".lock"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *rest, **options)
    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(JobError, match=r"cannot write to the output folder .*Permission denied.*make the folder writable"):
        run_job(make_job(TEXT), make_llm=NeverMade)


def test_parts_without_a_manifest_are_not_taken_over(make_job):
    job = make_job(TEXT)
    folder = pathlib.Path(job.output)
    folder.mkdir()
    (folder / "part-00000.jsonl").write_text("mine\n")
    with pytest.raises(JobError, match=r"holds parts of a job \(part-00000.jsonl\) but no manifest.json"):
        run_job(job, make_llm=NeverMade)
    assert (folder / "part-00000.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize("text", ["{torn", "[]", ""])
def test_a_damaged_manifest_is_refused(half_done, text):
    (pathlib.Path(half_done.output) / "manifest.json").write_text(text)
    with pytest.raises(JobError, match=r"manifest.json"):
        run_job(half_done, make_llm=NeverMade)


def test_a_folder_with_other_files_is_fine(make_job):
    job = make_job(TEXT)
    folder = pathlib.Path(job.output)
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert run_job(job, make_llm=FakeLLM).is_complete
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_row_that_the_engine_gives_up_is_not_finished(make_job):
    class Aborts(FakeLLM):
        def _output(self, number, prompt, params):
            output = super()._output(number, prompt, params)
            if number == 4:
                output.outputs[0].finish_reason = "abort"
            return output
    job = make_job(TEXT)
    with pytest.raises(JobError, match=r"the engine ended with 1 rows unfinished"):
        run_job(job, make_llm=Aborts)
    assert run_job(job, make_llm=FakeLLM).num_new == 1


def test_the_engine_is_closed_whatever_happens(make_job):
    engines = []

    class Noted(Dies):
        def __init__(self, model, *, max_num_seqs=4, **options):
            super().__init__(model, max_num_seqs=max_num_seqs, **options)
            engines.append(self)
    with pytest.raises(RuntimeError):
        run_job(make_job(TEXT), make_llm=Noted)
    assert [engine.is_closed for engine in engines] == [True]


def test_prompts_are_read_as_they_are_needed(make_job):
    class Slow(FakeLLM):
        def generate_iter(self, requests, **options):
            num_read = 0

            def counted():
                nonlocal num_read
                for request in requests:
                    num_read += 1
                    yield request
            for number, output in enumerate(super().generate_iter(counted(), **options)):
                assert num_read <= number + 2 * self.max_num_seqs
                yield output
    assert run_job(make_job(rows_text(100), rows_per_part=10), make_llm=Slow).is_complete


def test_a_job_that_has_ended_holds_no_file_open(make_job):
    job = make_job(TEXT)
    with pytest.raises(RuntimeError, match="the engine is gone"):
        run_job(job, make_llm=Dies)
    assert [file.path for file in psutil.Process().open_files() if file.path.startswith(os.path.realpath(job.output))] == []
