"""Shards that are put together are the unsharded job, file by file; what would make another job is refused before anything is written."""
import dataclasses
import errno
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.jobs import fake_llm
from tests.jobs.fake_job_process import REPOSITORY, end, start
from tests.jobs.fake_llm import FakeLLM
from tests.jobs.faulty_disk import MOMENTS, Death, FaultyDisk, PowerLossDisk, QuickDisk
from tests.jobs.small_job import contents, rows_text
from tpllm.cli.main import main
from tpllm.errors import JobError
from tpllm.jobs.merge import merge_shards
from tpllm.jobs.outputs.lock import held_for_writing
from tpllm.jobs.runner import run_job
from tpllm.jobs.status import job_status

TEXT = rows_text(11, bad=(1, 7))
NUM_SHARDS = 2


class NeverMade(FakeLLM):
    def __init__(self, *_, max_num_seqs=4, **__):
        raise AssertionError("no model is needed")


@pytest.fixture
def wanted(run_text):
    """The folder of the unsharded job."""
    return contents(run_text(TEXT, output="whole"))


@pytest.fixture
def shards(make_job):
    """Two complete shards of a job in ``out``."""
    jobs = [make_job(TEXT, shard=f"{index}/{NUM_SHARDS}") for index in range(NUM_SHARDS)]
    for job in jobs:
        run_job(job, make_llm=FakeLLM)
    return jobs


def tree(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rewrite_manifest(job, change) -> None:
    path = pathlib.Path(job.folder) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_merged_shards_are_the_unsharded_job_and_nothing_is_left_to_do(shards, wanted):
    output = pathlib.Path(shards[0].output)
    before = [contents(pathlib.Path(job.folder)) for job in shards]
    result = merge_shards(str(output))
    assert (result.num_rows, result.num_parts, result.num_new, result.num_shards, result.num_errors) == (11, 4, 4, 2, 2)
    assert contents(output) == wanted
    assert [contents(pathlib.Path(job.folder)) for job in shards] == before
    whole = dataclasses.replace(shards[0], shard=None)
    assert run_job(whole, make_llm=NeverMade).num_new == 0
    assert merge_shards(str(output)).num_new == 0
    assert contents(output) == wanted
    assert run_job(shards[0], make_llm=NeverMade).num_new == 0


def test_shards_of_several_machines_are_put_together_into_a_new_folder(shards, wanted, tmp_path):
    places = [tmp_path / f"machine-{index}" / "results" for index in range(NUM_SHARDS)]
    for job, place in zip(shards, places, strict=True):
        shutil.copytree(job.folder, place, ignore=shutil.ignore_patterns(".lock"))
    output = tmp_path / "new" / "merged"
    assert merge_shards(str(output), [str(place) for place in reversed(places)]).num_new == 4
    assert contents(output) == wanted
    assert not (places[0] / ".lock").exists()


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP])
def test_where_files_cannot_be_linked_they_are_copied(shards, wanted, number):
    class NoLinks(QuickDisk):
        def link(self, source, target):
            raise OSError(number, os.strerror(number))
    output = pathlib.Path(shards[0].output)
    merge_shards(str(output), disk=NoLinks())
    assert contents(output) == wanted
    assert os.stat(output / "part-00000.jsonl").st_nlink == 1


def test_a_shard_without_parts_is_no_hindrance(make_job, run_text):
    text = rows_text(5)
    for index in range(4):
        run_job(make_job(text, shard=f"{index}/4"), make_llm=FakeLLM)
    output = pathlib.Path(make_job(text).output)
    merge_shards(str(output))
    assert contents(output) == contents(run_text(text, output="whole"))


def test_an_empty_job_is_merged_too(make_job, run_text):
    for index in range(2):
        run_job(make_job("", shard=f"{index}/2"), make_llm=FakeLLM)
    output = pathlib.Path(make_job("").output)
    assert merge_shards(str(output)).num_parts == 1
    assert contents(output) == contents(run_text("", output="whole"))


def test_parts_that_the_unsharded_job_has_finished_are_kept_and_its_journals_go(shards, wanted, tmp_path):
    class Dies(FakeLLM):
        def generate_iter(self, *arguments, **options):
            for number, output in enumerate(super().generate_iter(*arguments, **options)):
                if number == 5:
                    raise RuntimeError("the engine is gone")
                yield output
    whole = dataclasses.replace(shards[0], shard=None, output=str(tmp_path / "begun"))
    with pytest.raises(RuntimeError, match="gone"):
        run_job(whole, make_llm=Dies)
    folder = pathlib.Path(whole.output)
    assert list(folder.glob("journal-*"))
    assert 0 < merge_shards(whole.output, [job.folder for job in shards]).num_new < 4
    assert contents(folder) == wanted


def test_errors_of_a_part_that_an_earlier_run_did_not_commit_go_when_the_part_comes(shards, wanted):
    output = pathlib.Path(shards[0].output)
    (output / "part-00001.errors.jsonl").write_bytes(b'{"row": 3}\n')  # the run died before the part's own file, and the row is fine now
    merge_shards(str(output))
    assert contents(output) == wanted


CHANGES = [({"sampling": {"max_tokens": 3}}, r"sampling.max_tokens is \(absent\) and 3"), ({"seed": 1}, r"seed is 0 and 1"),
           ({"model": "other"}, r"model is 'fake' and 'other'"), ({"rows_per_part": 4}, r"rows_per_part is 3 and 4")]


@pytest.mark.parametrize(("changes", "message"), CHANGES)
@pytest.mark.parametrize("is_allowed", [False, True])
def test_shards_of_different_jobs_are_refused_with_the_difference(shards, make_job, tmp_path, changes, message, is_allowed):
    other = make_job(TEXT, output="other", shard="1/2", **changes)
    run_job(other, make_llm=FakeLLM)
    before = tree(tmp_path)
    with pytest.raises(JobError, match=rf"the shards in .*shard-00000-of-00002 and .*shard-00001-of-00002 are of different jobs: .*{message}"):
        merge_shards(str(tmp_path / "merged"), [shards[0].folder, other.folder], allow_environment_change=is_allowed)
    assert tree(tmp_path) == before


def test_shards_of_different_inputs_are_refused(shards, make_job, tmp_path):
    other = make_job(TEXT.replace("p3", "p4"), output="other", shard="1/2")
    run_job(other, make_llm=FakeLLM)
    with pytest.raises(JobError, match=r"of different jobs: input\."):
        merge_shards(str(tmp_path / "merged"), [shards[0].folder, other.folder])


def test_shards_of_different_weights_are_refused(shards):
    rewrite_manifest(shards[1], lambda manifest: manifest["model"].update(sha256="1" * 8))
    with pytest.raises(JobError, match=r"of different jobs: model.sha256 is '00000000' and '11111111'"):
        merge_shards(shards[0].output, allow_environment_change=True)


def test_different_environments_are_refused_unless_allowed_and_then_recorded(make_job, wanted, monkeypatch):
    jobs = [make_job(TEXT, shard=f"{index}/2") for index in range(2)]
    run_job(jobs[0], make_llm=FakeLLM)
    monkeypatch.setitem(fake_llm.VERSIONS, "jax", "9.9")
    run_job(jobs[1], make_llm=FakeLLM)
    output = pathlib.Path(jobs[0].output)
    with pytest.raises(JobError, match=r"ran in different environments: environment.jax is '0.0-fake' and '9.9'.*--allow-environment-change"):
        merge_shards(str(output))
    assert not (output / "manifest.json").exists()
    for _ in range(2):  # the second finds everything done, and records nothing twice
        merge_shards(str(output), allow_environment_change=True)
        merged = contents(output)
        manifest = json.loads(merged.pop("manifest.json"))
        assert manifest.pop("environment_changes") == [{"shard": "1/2", "changes": [["environment.jax", "0.0-fake", "9.9"]]}]
        assert manifest == json.loads(wanted["manifest.json"])
        assert merged == {name: data for name, data in wanted.items() if name != "manifest.json"}


def test_what_a_shard_recorded_of_its_own_environments_is_kept(shards):
    entry = {"num_rows_done": 2, "changes": [["environment.jax", "8.8", "0.0-fake"]]}
    rewrite_manifest(shards[1], lambda manifest: manifest.update(environment_changes=[entry]))
    merge_shards(shards[0].output)
    manifest = json.loads((pathlib.Path(shards[0].output) / "manifest.json").read_text())
    assert manifest["environment_changes"] == [{"shard": "1/2", **entry}]


def test_a_missing_shard_is_named_with_the_command_that_makes_it(make_job):
    for index in (0, 2, 4):
        run_job(make_job(TEXT, shard=f"{index}/5"), make_llm=FakeLLM)
    with pytest.raises(JobError, match=r"shards 1/5, 3/5 are missing; run it with: tpllm run JOB.yaml --shard 1/5"):
        merge_shards(make_job(TEXT).output)


def test_a_doubled_shard_is_refused(shards, tmp_path):
    twin = tmp_path / "twin"
    shutil.copytree(shards[0].folder, twin)
    with pytest.raises(JobError, match=r"shard 0/2 is there twice, in .* and in "):
        merge_shards(str(tmp_path / "merged"), [*(job.folder for job in shards), str(twin)])


def test_shards_of_different_numbers_are_refused(shards, make_job, tmp_path):
    other = make_job(TEXT, output="other", shard="1/3")
    run_job(other, make_llm=FakeLLM)
    with pytest.raises(JobError, match=r"is shard 0/2 and .* is shard 1/3: these are shards of different numbers"):
        merge_shards(str(tmp_path / "merged"), [shards[0].folder, other.folder])


def test_an_incomplete_shard_is_named_with_its_rows_and_the_command_that_finishes_it(shards):
    (pathlib.Path(shards[1].folder) / "part-00001.jsonl").unlink()
    before = tree(pathlib.Path(shards[0].output))
    with pytest.raises(JobError, match=r"shard 1/2 in \S+ is incomplete: part 1 of its 2 is missing \(3 rows: 3 to 5\); "
                                       r"finish it with: tpllm run JOB.yaml --shard 1/2 --output \S+out$"):
        merge_shards(shards[0].output)
    assert tree(pathlib.Path(shards[0].output)) == before
    assert run_job(shards[1], make_llm=FakeLLM).is_complete
    assert merge_shards(shards[0].output).num_new == 4


@pytest.mark.parametrize("damage", ["lines", "torn", "no errors file"])
def test_a_part_that_was_copied_only_in_part_is_refused(shards, damage):
    folder = pathlib.Path(shards[0].folder)
    part = folder / "part-00000.jsonl"
    if damage == "no errors file":
        (folder / "part-00000.errors.jsonl").unlink()
    else:
        part.write_bytes(part.read_bytes()[:-1] if damage == "torn" else part.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(JobError, match=r"part-00000.jsonl.* should hold 3 whole rows .*copy it again, or remove it and run the shard again"):
        merge_shards(shards[0].output)


def test_a_shard_that_a_process_runs_is_refused(shards):
    with held_for_writing(pathlib.Path(shards[1].folder)), pytest.raises(JobError, match=rf"another process \(pid {os.getpid()}\) is running"):
        merge_shards(shards[0].output)


def test_an_output_that_a_process_runs_is_refused(shards):
    with held_for_writing(pathlib.Path(shards[1].output)), pytest.raises(JobError, match=r"another process .* is running the job in .*out;"):
        merge_shards(shards[0].output)


def test_an_output_that_holds_another_job_is_refused_and_kept(shards, make_job):
    other = make_job(TEXT, output="other", seed=1)
    run_job(other, make_llm=FakeLLM)
    before = tree(pathlib.Path(other.output))
    with pytest.raises(JobError, match=r"belongs to another job: seed was 1 and is now 0"):
        merge_shards(other.output, [job.folder for job in shards])
    assert tree(pathlib.Path(other.output)) == before


def test_what_is_no_shard_is_refused(shards, tmp_path, run_text):
    whole = run_text(TEXT, output="whole")
    for folders, message in (([str(whole)], r"is the folder of a job that is not sharded"), ([str(tmp_path / "none")], r"is not there"),
                             ([shards[0].output], r"no shard was begun there; did you mean .*shard-00000-of-00002\?"),
                             (["s3://bucket/out"], r"s3://bucket/out is a URL; copy"), ([], r"holds no shards of a job")):
        with pytest.raises(JobError, match=message):
            merge_shards(str(tmp_path / "merged"), folders)
        assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("text", ["{torn", "[]", "{}", '{"job": 3}', '{"job": {"rows_per_part": 0, "shard": "0/2"}, "input": {"num_rows": 3}}',
                                  '{"job": {"rows_per_part": 3, "shard": "2/2"}, "input": {"num_rows": 3}}'])
def test_a_damaged_manifest_of_a_shard_is_refused(shards, text):
    (pathlib.Path(shards[1].folder) / "manifest.json").write_text(text)
    with pytest.raises(JobError, match=r"shard-00001-of-00002.*"):
        merge_shards(shards[0].output)


def test_a_merge_that_ends_at_any_disk_call_is_completed_by_the_next_or_by_the_job(tmp_path):
    (tmp_path / "rows.jsonl").write_text(TEXT)
    command = [sys.executable, "-m", "tests.jobs.exit_at_every_merge_call", str(tmp_path / "rows.jsonl"), str(tmp_path / "folder")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("has_links", [True, False])
def test_a_merge_that_loses_power_at_any_disk_call_is_completed_by_the_next(shards, wanted, tmp_path, moment, has_links):
    class NoLinks(PowerLossDisk):
        def link(self, source, target):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
    folders = [job.folder for job in shards]
    before = [contents(pathlib.Path(folder)) for folder in folders]
    for number in itertools.count():
        output, disk = tmp_path / f"merged-{number}", (PowerLossDisk if has_links else NoLinks)(number, moment)
        try:
            merge_shards(str(output), folders, disk=disk)
        except Death:
            disk.lose_power(output)
        merge_shards(str(output), folders, disk=QuickDisk())
        assert contents(output) == wanted
        assert [contents(pathlib.Path(folder)) for folder in folders] == before
        if not disk.has_struck:
            break
    assert number > {"half": 0 if has_links else 5}.get(moment, 25)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_at_any_call_of_a_merge_is_one_clear_error(shards, wanted, tmp_path, moment):
    def no_space():
        raise OSError(errno.ENOSPC, "No space left on device")
    folders = [job.folder for job in shards]
    for number in itertools.count():
        output = tmp_path / f"merged-{number}"
        disk = FaultyDisk(number, moment, no_space, is_mortal=False)
        error = ""
        try:
            merge_shards(str(output), folders, disk=disk)
        except JobError as caught:
            error = str(caught)
        assert ("cannot write to the output folder" in error) == disk.has_struck
        if not disk.has_struck:
            break
        merge_shards(str(output), folders, disk=QuickDisk())
        assert contents(output) == wanted
    assert number > 0


def test_two_shards_run_as_two_processes_at_once_merge_into_the_unsharded_job(make_job, tmp_path, capsys):
    text = rows_text(40, bad=(9, 30))
    engine = {"max_num_seqs": 3, "tick_s": 0.005}
    whole = make_job(text, output="whole", engine=engine)
    jobs = [make_job(text, engine=engine, shard=f"{index}/2") for index in range(2)]
    processes = [start(job) for job in (whole, *jobs)]
    assert [end(process) for process in processes] == [0, 0, 0]
    assert main(["job", "merge", jobs[0].output]) == 0
    assert "merged 2 shards: 40 rows in" in capsys.readouterr().err
    assert contents(pathlib.Path(jobs[0].output)) == contents(pathlib.Path(whole.output))


def test_parquet_parts_are_merged_and_counted_too(make_job, run_text):
    pytest.importorskip("pyarrow")
    whole = run_text(TEXT, output="whole", output_format="parquet")
    jobs = [make_job(TEXT, shard=f"{index}/2", output_format="parquet") for index in range(2)]
    for job in jobs:
        run_job(job, make_llm=FakeLLM)
    assert merge_shards(jobs[0].output).num_errors == 2
    output = pathlib.Path(jobs[0].output)
    assert contents(output) == contents(whole)
    assert len(list(output.glob("part-*.parquet"))) == 4
    status, wanted = job_status(jobs[0].output, counts_tokens=True), job_status(str(run_text(TEXT, output="lines")), counts_tokens=True)
    assert status.together.completion_tokens == wanted.together.completion_tokens > 0
    assert (status.whole.num_done, [shard.num_done for shard in status.shards]) == (11, [6, 5])
    (pathlib.Path(jobs[1].folder) / "part-00001.parquet").write_bytes(b"half a file")
    with pytest.raises(JobError, match=r"part-00001\.parquet"):
        merge_shards(jobs[0].output)
