"""``tpllm job retry`` runs failed rows again, and no others, in the folder where they are; how jobs end that have failures."""
import dataclasses
import json
import pathlib

import pytest

from tests.jobs import fake_llm
from tests.jobs.fake_llm import DyingLLM, FailingLLM, FakeLLM
from tests.jobs.small_job import all_errors, all_rows, contents, rows_text
from tpllm.cli.main import main
from tpllm.errors import JobError
from tpllm.jobs.config import JobConfig, make_job
from tpllm.jobs.job_of_folder import read_job_folder
from tpllm.jobs.merge import merge_shards
from tpllm.jobs.runner import run_job
from tpllm.jobs.status import job_status

TEXT = rows_text(11, bad=(1, 7))
FAILED = [0, 1, 4, 7, 8]  # of the nine that are JSON, every third


def parts(folder) -> dict[str, bytes]:
    return {name: data for name, data in contents(pathlib.Path(folder)).items() if name != "manifest.json"}


def retry(folder, make_llm=FakeLLM, **keys):
    """Retry what the folder itself tells of."""
    return run_job(make_job({**read_job_folder(str(folder)), **keys}), make_llm=make_llm, retries_failed=True)


@pytest.fixture
def failed(make_job):
    """A job of which some rows failed for reasons of the engine, and two for what they are."""
    job = make_job(TEXT)
    run_job(job, make_llm=FailingLLM)
    assert [row["row"] for row in all_errors(pathlib.Path(job.output))] == FAILED
    return job


def test_only_failed_rows_are_run_and_the_folder_is_then_that_of_a_job_in_which_they_never_failed(failed, run_text, tmp_path):
    log = tmp_path / "calls"

    class Logged(FakeLLM):
        def __init__(self, model, *, max_num_seqs=4, **options):
            super().__init__(model, max_num_seqs=max_num_seqs, calls=log, **options)
    result = retry(failed.output, Logged)
    assert (result.num_new, result.num_errors, result.num_new_errors, result.is_complete) == (5, 2, 2, True)
    assert len(log.read_text().splitlines()) == 3
    whole = run_text(TEXT, output="whole")
    assert parts(failed.output) == parts(whole)
    ours, theirs = (json.loads(contents(folder)["manifest.json"]) for folder in (pathlib.Path(failed.output), whole))
    assert ours.pop("environment_changes") == [{"num_rows_done": 6, "num_rows_to_retry": 5, "changes": []}]
    assert ours == theirs
    assert not job_status(failed.output, verifies=True).whole.problems


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_retry_makes_parquet_parts_of_any_input_that_equal_those_of_a_job_without_failures(tmp_path, kind):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / f"rows.{kind}"
    columns = {"prompt": [f"p{i}" for i in range(9)], "score": [i + 0.5 for i in range(9)], "tags": [[i, "x"] for i in range(9)],
               "sampling": [{"n": 2, "logprobs": 1, "prompt_logprobs": None} for _ in range(9)]}
    records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif kind == "csv":
        cells = ["\"" + json.dumps(record["sampling"]).replace("\"", "\"\"") + "\"" for record in records]
        path.write_text("prompt,sampling\n" + "".join(f"{record['prompt']},{cell}\n" for record, cell in zip(records, cells, strict=True)))
    else:
        pq.write_table(pa.table({**columns, "tags": [str(tag) for tag in columns["tags"]]}), path)

    def job(name: str) -> JobConfig:
        return JobConfig(model="fake", input=str(path), output=str(tmp_path / name), rows_per_part=4, output_format="parquet")
    run_job(job("failed"), make_llm=FailingLLM)
    run_job(job("whole"), make_llm=FakeLLM)
    retry(tmp_path / "failed")
    assert parts(tmp_path / "failed") == parts(tmp_path / "whole")


def test_nothing_is_touched_where_no_row_failed_and_no_model_is_loaded(run_text):
    folder = run_text(rows_text(5))
    before = contents(folder)
    assert retry(folder, make_llm=None).num_new == 0
    assert contents(folder) == before


def test_a_part_stays_in_place_until_the_first_of_its_rows_is_finished_again_also_when_the_model_cannot_be_loaded(make_job):
    job, seen = make_job(rows_text(9)), []
    run_job(job, make_llm=FailingLLM)
    before = parts(job.output)

    class Broken(FakeLLM):
        def __init__(self, *_, max_num_seqs=4, **__):
            raise RuntimeError("no memory")

    class Looking(FakeLLM):
        def _output(self, *arguments):
            seen.append(parts(job.output))
            return super()._output(*arguments)
    with pytest.raises(RuntimeError, match="no memory"):
        retry(job.output, Broken)
    assert parts(job.output) == before
    retry(job.output, Looking)
    assert seen[0] == before


def test_an_incomplete_job_is_completed_and_its_failed_rows_are_run_again_also_those_in_a_journal(make_job, run_text):
    class Both(DyingLLM, FailingLLM):
        num_outputs = 4
    job = make_job(TEXT)
    with pytest.raises(RuntimeError, match="the engine is gone"):
        run_job(job, make_llm=Both)
    status = job_status(job.output).whole
    assert status.num_failed > 0
    assert status.num_in_journals > 0
    assert retry(job.output).is_complete
    assert parts(job.output) == parts(run_text(TEXT, output="whole"))


def test_a_retry_that_was_interrupted_is_completed_by_the_run_as_far_as_it_came_and_shown_by_the_status(failed, run_text):
    class Dies(DyingLLM):
        num_outputs = 1
    with pytest.raises(RuntimeError, match="the engine is gone"):
        retry(failed.output, Dies)
    status = job_status(failed.output).whole
    assert (status.is_complete, status.num_done, status.problems) == (False, 10, [])
    assert run_job(failed, make_llm=FakeLLM).num_new == 1
    assert retry(failed.output).num_errors == 2
    assert parts(failed.output) == parts(run_text(TEXT, output="whole"))


def test_a_part_that_is_not_what_was_committed_is_refused_before_anything_is_run(failed):
    path = pathlib.Path(failed.output, "part-00001.jsonl")
    path.write_bytes(path.read_bytes().replace(b"p3", b"p4"))
    before = contents(pathlib.Path(failed.output))
    with pytest.raises(JobError, match=r"the SHA-256 of part-00001.jsonl is not"):
        retry(failed.output, make_llm=None)
    assert contents(pathlib.Path(failed.output)) == before


def test_another_environment_is_refused_unless_it_is_allowed(failed, monkeypatch):
    monkeypatch.setitem(fake_llm.VERSIONS, "jax", "9.9")
    with pytest.raises(JobError, match=r"begun in another environment: environment.jax was '0.0-fake' and is now '9.9'"):
        retry(failed.output)
    assert retry(failed.output, allow_environment_change=True).num_new == 5


def test_shards_are_retried_one_by_one_or_once_they_are_merged_and_the_shards_stay_what_they_were(make_job, run_text):
    jobs = [make_job(TEXT, shard=f"{index}/2") for index in range(2)]
    for job in jobs:
        run_job(job, make_llm=FailingLLM)
    output = jobs[0].output
    with pytest.raises(JobError, match=r"it holds shards: give the folder of one, such as .*shard-00000-of-00002"):
        retry(output)
    retry(jobs[0].folder)
    merge_shards(output)
    before = contents(pathlib.Path(jobs[1].folder))
    assert retry(output).num_errors == 2
    assert parts(output) == parts(run_text(TEXT, output="whole"))
    assert contents(pathlib.Path(jobs[1].folder)) == before


def test_a_copy_of_a_retried_folder_behind_a_url_follows_it_and_an_older_working_folder_does_too(make_job, tmp_path):
    job = dataclasses.replace(make_job(TEXT), output=f"file://{tmp_path}/far", work_dir=str(tmp_path / "work"))
    run_job(job, make_llm=FailingLLM)
    elsewhere = dataclasses.replace(job, work_dir=str(tmp_path / "elsewhere"))
    run_job(elsewhere, make_llm=None)
    with pytest.raises(JobError, match="is a URL; copy the folder"):
        retry(job.output)
    retry(job.work_dir)
    for again in (job, elsewhere):
        assert run_job(again, make_llm=None).num_errors == 2
        assert contents(tmp_path / "far") == contents(pathlib.Path(again.work_dir)) == contents(pathlib.Path(job.work_dir))


@pytest.mark.parametrize(("change", "message"), [
    (lambda manifest: manifest.pop("paths"), r"out: input is missing; add 'input: ...' or give --input"),
    (lambda manifest: manifest["paths"].pop("working_directory"), r"manifest.json is damaged: KeyError\('working_directory'\)"),
    (lambda manifest: manifest.pop("job"), r"manifest.json is damaged: KeyError\('job'\); restore it"),
    (lambda manifest: manifest["job"].update(modle="x"), r"manifest.json: unknown key 'modle'; did you mean 'model'\?"),
    (lambda manifest: manifest["job"].update(shard="0/2"), r"out is the folder of shard 0/2 under the name out; call it shard-00000-of-00002"),
])
def test_a_folder_whose_manifest_does_not_tell_the_job_is_refused_with_what_is_missing(failed, change, message):
    path = pathlib.Path(failed.output, "manifest.json")
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(JobError, match=message):
        make_job(read_job_folder(failed.output), name=failed.output)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """``command(*words, make_llm=FakeLLM)``: the exit code and what is said, in a folder that has rows of which the second is not JSON."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(TEXT)

    def command(*words, make_llm=FakeLLM) -> tuple[int, str]:
        code = main(words, make_llm=make_llm)
        return code, capsys.readouterr().err
    return command


RUN = ("run", "-i", "rows.jsonl", "-o", "out", "-m", "fake")


def test_the_command_retries_what_failed_and_its_exit_code_is_1_where_all_failed_again(command):
    assert command(*RUN, make_llm=FailingLLM)[0] == 0
    code, said = command("job", "retry", "out")
    assert (code, said.splitlines()[-1]) == (0, "tpllm: complete: 11 rows in out (5 retried); 2 failed: see out/part-*.errors.jsonl")
    code, said = command("job", "retry", "out")
    assert code == 1
    assert said.splitlines()[-1].startswith("tpllm: every row that was retried failed; the last: row 7 (")
    pathlib.Path("rows.jsonl").rename("moved.jsonl")
    assert command("job", "retry", "out")[0] == 2
    code, said = command("job", "retry", "out", "-i", "moved.jsonl", "--max-failures", "0")
    assert code == 1
    assert "stopped, because 1 row failed, which is more than max_failures 0; the last: row 1 (moved.jsonl line 2): not JSON" in said


def test_a_job_of_which_every_row_failed_ends_with_1_and_the_reason_and_one_of_no_rows_with_0(command):
    pathlib.Path("rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    code, said = command(*RUN)
    assert code == 1
    assert "tpllm: every row failed; the last: row 1 (rows.jsonl line 2): the row has 'text' and no prompt" in said
    assert command(*RUN)[0] == 1
    pathlib.Path("rows.jsonl").write_text("")
    assert command(*RUN, "-o", "empty")[0] == 0


def test_more_failures_than_allowed_end_the_job_with_1_and_what_is_finished_is_kept(command):
    code, said = command(*RUN, "--rows-per-part", "2", "--max-failures", "1")
    assert code == 1
    assert "stopped, because 2 rows failed, which is more than max_failures 1; the last: row 7 (rows.jsonl line 8): not JSON" in said
    assert "give a larger --max-failures to go on" in said
    num_done = job_status("out").whole.num_done
    assert 2 <= num_done < 11
    assert command(*RUN, "--rows-per-part", "2", "--max-failures", "1", make_llm=None)[0] == 1
    assert command(*RUN, "--rows-per-part", "2", "--max-failures", "2")[0] == 0
    assert len(all_rows(pathlib.Path("out"))) == 9
    code, said = command(*RUN, "--rows-per-part", "2", "--max-failures", "0", make_llm=None)
    assert (code, said.splitlines()[-1]) == (1, "tpllm: 2 rows failed, which is more than max_failures 0")
