"""An output behind a URL: a copy of what the job commits in its local working folder."""
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import sys

import fsspec
import pyarrow.parquet as pq
import pytest

from tests.jobs import fake_llm
from tests.jobs.fake_job_process import NoSleepLLM, kill, start, wait_for
from tests.jobs.fake_llm import FakeLLM
from tests.jobs.faulty_disk import Death, FaultyDisk
from tests.jobs.small_job import contents, rows_text
from tpllm.errors import JobError
from tpllm.jobs.config import load_job
from tpllm.jobs.outputs.remote import RemoteFolder, output_place
from tpllm.jobs.runner import run_job

TEXT = rows_text(11, bad=(1, 7))
numbers = itertools.count()


@pytest.fixture
def make_remote(make_job, tmp_path):
    """``make_remote(protocol, work="work", **keys)``: the small job with an output in memory, or in a folder behind file://."""
    name = f"remote-{os.getpid()}-{next(numbers)}"

    def make(protocol: str = "memory", *, work: str = "work", text: str = TEXT, **keys):
        url = f"memory://{name}/out" if protocol == "memory" else f"file://{tmp_path}/far/out"
        return dataclasses.replace(make_job(text, **keys), output=url, work_dir=str(tmp_path / work))
    return make


def far(url: str) -> dict[str, bytes]:
    """The files behind a URL."""
    filesystem, path = fsspec.url_to_fs(url)
    return {name.rpartition("/")[2]: filesystem.cat_file(name) for name in filesystem.find(path)}


def near(job) -> dict[str, bytes]:
    return contents(pathlib.Path(job.work_dir))


@pytest.fixture
def wanted(run_text):
    """The folder of the same job, never interrupted and all local."""
    return contents(run_text(TEXT, output="uninterrupted"))


class Dies(FakeLLM):
    """Ends after some rows, as a process that is killed; which parts are there by then is part of the test."""

    def generate_iter(self, *arguments, **options):
        for number, output in enumerate(super().generate_iter(*arguments, **options)):
            if number == 6:
                raise Death
            yield output


@pytest.fixture
def begin():
    """Run a job until it dies with some parts committed."""
    def begin(job):
        with pytest.raises(Death):
            run_job(job, make_llm=Dies)
        assert 0 < sum(name.endswith(("0.jsonl", "1.jsonl", "2.jsonl")) and name.startswith("part") for name in far(job.output)) < 4
    return begin


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_all_that_a_local_job_writes_is_there_in_the_end(make_remote, wanted, protocol):
    job = make_remote(protocol)
    result = run_job(job, make_llm=FakeLLM)
    assert (result.is_complete, result.output) == (True, job.output)
    assert far(job.output) == near(job) == wanted


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_parquet_parts_are_copied_too(make_remote, protocol, tmp_path):
    job = make_remote(protocol, output_format="parquet")
    run_job(job, make_llm=FakeLLM)
    assert far(job.output) == near(job)
    assert sum(name.endswith(".parquet") for name in near(job)) == 4
    assert pq.read_metadata(tmp_path / "work/part-00001.parquet").num_rows == 3


def test_a_part_is_copied_when_it_is_committed_and_its_errors_before_it(make_remote, begin, monkeypatch):
    uploaded = []
    real = RemoteFolder.upload
    monkeypatch.setattr(RemoteFolder, "upload", lambda self, path: (uploaded.append(path.name), real(self, path))[1])
    job = make_remote()
    begin(job)
    assert uploaded[0] == "manifest.json"
    assert "journal-00003.jsonl" not in far(job.output)
    run_job(job, make_llm=FakeLLM)
    parts = [name for name in uploaded if name.startswith("part")]
    assert parts.index("part-00000.errors.jsonl") == parts.index("part-00000.jsonl") - 1
    assert len(parts) == len(set(parts)) == 6


def test_a_job_goes_on_where_it_was_on_the_same_machine(make_remote, begin, wanted):
    job = make_remote()
    begin(job)
    assert run_job(job, make_llm=FakeLLM).num_new <= 5
    assert far(job.output) == near(job) == wanted


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_another_machine_goes_on_with_what_is_committed(make_remote, begin, wanted, protocol):
    begin(make_remote(protocol))
    other = make_remote(protocol, work="another machine")
    result = run_job(other, make_llm=FakeLLM)
    assert result.is_complete
    assert result.num_new < 11
    assert far(other.output) == near(other) == wanted
    again = run_job(make_remote(protocol), make_llm=FakeLLM)  # the first machine takes over what the other did
    assert (again.num_new, again.is_complete) == (0, True)
    assert near(make_remote(protocol)) == wanted


def test_what_was_committed_but_not_copied_is_copied_at_the_next_start(make_remote, wanted, monkeypatch):
    job, real = make_remote(), RemoteFolder.upload

    def unreachable(self, path):
        if path.name == "part-00001.jsonl":
            raise JobError("the network is down")
        real(self, path)
    monkeypatch.setattr(RemoteFolder, "upload", unreachable)
    with pytest.raises(JobError, match="the network is down"):
        run_job(job, make_llm=FakeLLM)
    assert "part-00001.jsonl" in near(job)
    assert "part-00001.jsonl" not in far(job.output)
    monkeypatch.setattr(RemoteFolder, "upload", real)
    assert run_job(job, make_llm=FakeLLM).is_complete
    assert far(job.output) == near(job) == wanted


def test_a_complete_job_whose_copy_lost_files_gets_them_back_without_a_model(make_remote, wanted):
    job = make_remote("file")
    run_job(job, make_llm=FakeLLM)
    folder = pathlib.Path(job.output.removeprefix("file://"))
    (folder / "part-00002.jsonl").unlink()
    (folder / "part-00001.jsonl").write_text("cut off")
    (folder / "manifest.json").unlink()
    assert run_job(job, make_llm=None).is_complete
    assert far(job.output) == wanted


def test_a_process_that_dies_at_any_disk_call_is_resumed_here_or_elsewhere(make_remote, wanted, tmp_path):
    for number in range(0, 200, 7):
        shutil.rmtree(tmp_path / "far", ignore_errors=True)
        job, disk = make_remote("file", work=f"work-{number}"), FaultyDisk(number, "after", _die)
        try:
            run_job(job, make_llm=FakeLLM, disk=disk, sync_interval_s=0)
        except Death:
            pass
        if number % 2:
            job = make_remote("file", work=f"elsewhere-{number}")
        assert run_job(job, make_llm=FakeLLM).is_complete
        assert far(job.output) == near(job) == wanted, number
        if not disk.has_struck:
            break
    assert number > 60


def _die():
    raise Death


def test_a_download_that_is_cut_off_is_begun_again(make_remote, begin, wanted):
    begin(make_remote())
    for number in range(3, 24):
        job = make_remote(work=f"work-{number}")
        with pytest.raises(Death):
            run_job(job, make_llm=FakeLLM, disk=FaultyDisk(number, "before", _die))
        assert "part-00000.errors.jsonl" in near(job) or "part-00000.jsonl" not in near(job), number
    assert run_job(job, make_llm=FakeLLM).is_complete
    assert far(job.output) == near(job) == wanted


def test_a_killed_job_is_finished_byte_for_byte(make_remote, run_text, tmp_path):
    text, engine = rows_text(60, bad=(9,)), {"max_num_seqs": 4, "tick_s": 0.01}
    whole = contents(run_text(text, output="whole", rows_per_part=4, engine={"max_num_seqs": 4}))
    job = make_remote("file", text=text, rows_per_part=4, engine=engine)
    process = start(job)
    wait_for(lambda: len(list((tmp_path / "far/out").glob("part-*.jsonl"))) > 4, process)
    kill(process)
    assert run_job(job, make_llm=NoSleepLLM).num_new > 0
    assert {name: data for name, data in far(job.output).items() if name != "manifest.json"} == {
        name: data for name, data in whole.items() if name != "manifest.json"}  # which tells of an engine without pauses


def test_another_job_there_is_refused_and_nothing_is_written(make_remote, begin):
    begin(make_remote())
    before = far(make_remote().output)
    with pytest.raises(JobError, match=r"the output folder memory://.* belongs to another job: seed was 0 and is now 1"):
        run_job(make_remote(work="other", seed=1), make_llm=FakeLLM)
    with pytest.raises(JobError, match=r"input.num_rows was 11 and is now 5"):
        run_job(make_remote(text=rows_text(5)), make_llm=FakeLLM)
    assert far(make_remote().output) == before


def test_a_working_folder_of_another_job_is_refused(make_remote, begin, make_job, tmp_path):
    begin(make_remote())
    run_job(make_job(TEXT, output="local", seed=5), make_llm=FakeLLM)
    with pytest.raises(JobError, match=r"memory://.* and its working folder .*local belong to different jobs: seed is 0 there and 5 here"):
        run_job(make_remote(work="local"), make_llm=FakeLLM)


def test_the_longer_history_of_the_environment_is_kept(make_remote, begin, monkeypatch):
    begin(make_remote())
    monkeypatch.setitem(fake_llm.VERSIONS, "jax", "9.9")
    other = make_remote(work="other", allow_environment_change=True)
    assert run_job(other, make_llm=FakeLLM).is_complete
    assert len(json.loads(far(other.output)["manifest.json"])["environment_changes"]) == 1
    run_job(make_remote(), make_llm=None)
    assert near(make_remote()) == near(other) == far(other.output)


@pytest.mark.parametrize(("name", "data", "message"), [
    ("manifest.json", b"{torn", r"cannot read memory://.*/manifest.json"), ("manifest.json", b"[]", r"manifest.json is no manifest"),
    ("part-00000.jsonl", b"mine\n", r"holds parts of a job but no manifest.json"),
])
def test_a_remote_folder_that_holds_something_else_is_refused(make_remote, name, data, message):
    job = make_remote()
    with fsspec.open(f"{job.output}/{name}", "wb") as file:
        file.write(data)
    with pytest.raises(JobError, match=message):
        run_job(job, make_llm=FakeLLM)
    assert far(job.output) == {name: data}


def test_a_remote_folder_that_cannot_be_written_is_one_clear_error(make_remote, wanted, tmp_path):
    job = make_remote("file")
    (tmp_path / "far").write_text("a file in the way")
    with pytest.raises(JobError, match=r"cannot copy to or from the output file://.*is kept in .*work: run the job again to go on"):
        run_job(job, make_llm=FakeLLM)
    (tmp_path / "far").unlink()
    run_job(job, make_llm=FakeLLM)
    assert far(job.output) == wanted


def test_the_working_folder_is_in_the_cache_and_one_for_each_url(make_remote, monkeypatch, tmp_path):
    monkeypatch.setenv("TPLLM_CACHE_DIR", str(tmp_path / "cache"))
    job = dataclasses.replace(make_remote(), work_dir=None)
    path, remote = output_place(job)
    assert path.parent == tmp_path / "cache" / "jobs"
    assert remote is not None
    assert output_place(dataclasses.replace(job, output=job.output + "/"))[0] == path
    assert output_place(dataclasses.replace(job, output=job.output + "2"))[0] != path
    assert output_place(dataclasses.replace(job, output="local/out")) == (pathlib.Path("local/out"), None)
    monkeypatch.setenv("TPLLM_CACHE_DIR", "off")
    with pytest.raises(JobError, match=r"TPLLM_CACHE_DIR is off; set work_dir"):
        output_place(job)


def test_a_protocol_without_its_package_names_the_package_before_anything_is_run(make_job, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(JobError, match=r"cannot open s3://bucket/out: s3:// needs a package: pip install s3fs"):
        run_job(dataclasses.replace(make_job(TEXT), output="s3://bucket/out"), make_llm=None)


def test_a_working_folder_for_a_local_output_is_refused(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("model: demo\ninput: a.jsonl\noutput: out\nwork_dir: work\n")
    with pytest.raises(JobError, match=r"work_dir is 'work' and output is 'out', which is local"):
        load_job(path)
    assert load_job(path, ["--output", "s3://bucket/out"]).work_dir == "work"
