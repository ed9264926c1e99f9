"""A part that was emptied, cut, replaced or lost after it was committed is found by every command, does not count, and is made again once removed."""
import dataclasses
import json
import pathlib
import shutil

import pyarrow.parquet as pq
import pytest

from tests.jobs.fake_llm import DyingLLM, FakeLLM
from tests.jobs.small_job import contents, rows_text
from tpllm.cli.main import main
from tpllm.errors import JobError
from tpllm.jobs.dry_run.run import dry_run
from tpllm.jobs.merge import merge_shards
from tpllm.jobs.outputs.part_files import part_files
from tpllm.jobs.outputs.part_records import COMMITS, record_of
from tpllm.jobs.runner import run_job
from tpllm.jobs.status import job_status

TEXT = rows_text(11, bad=(1, 7))


class NeverMade(FakeLLM):
    def __init__(self, *_, max_num_seqs=4, **__):
        raise AssertionError("no model is needed")


def cut_at_a_line(data: bytes) -> bytes:
    return b"".join(data.splitlines(keepends=True)[:-1])


def other_rows(data: bytes) -> bytes:
    """As many rows in as many bytes."""
    return data.replace(b"fake", b"FAKE").replace(b"[", b"(")


DAMAGE = {"emptied": lambda data: b"", "cut": lambda data: data[:len(data) // 2], "cut at a line": cut_at_a_line,
          "torn at its end": lambda data: data[:-1],
          "zeros": lambda data: bytes(len(data)), "longer": lambda data: data + b"{}\n", "lines joined": lambda data: data.replace(b"\n", b" ", 1)}
REFUSED = r"should hold 3 whole rows .*copy it again, or remove it and run the job again"


@pytest.mark.parametrize(("output_format", "what"), [*(("jsonl", what) for what in DAMAGE),
                                                     *(("parquet", what) for what in ("emptied", "cut", "zeros"))])
def test_a_damaged_part_does_not_count_and_is_made_again_once_it_is_removed(make_job, output_format, what):
    job = make_job(TEXT, output_format=output_format)
    run_job(job, make_llm=FakeLLM)
    folder = pathlib.Path(job.output)
    wanted = contents(folder)
    for name in (f"part-00001.{output_format}", f"part-00002.{output_format}", "part-00002.errors.jsonl"):
        path = folder / name
        path.write_bytes(DAMAGE[what](wanted[name]))
        damaged = contents(folder)
        with pytest.raises(JobError, match=rf"{name}.* {REFUSED}"):
            run_job(job, make_llm=NeverMade)
        with pytest.raises(JobError, match=rf"{name}.* {REFUSED}"):
            dry_run(job, make_llm=NeverMade)
        status = job_status(job.output, counts_tokens=True).together
        assert (status.num_committed, status.num_done, status.is_complete) == (3, 8, False)
        assert name in status.problems[0]
        assert contents(folder) == damaged
        for file in part_files(folder)[int(name[5:10])].paths:
            file.unlink()
        assert run_job(job, make_llm=FakeLLM).num_new == 3
        assert contents(folder) == wanted


@pytest.mark.parametrize("output_format", ["jsonl", "parquet"])
def test_other_content_of_the_same_length_is_found_by_the_hash(make_job, output_format, capsys):
    job = make_job(TEXT, output_format=output_format)
    run_job(job, make_llm=FakeLLM)
    path = pathlib.Path(job.output) / f"part-00001.{output_format}"
    assert main(["job", "status", job.output, "--verify"]) == 0
    assert "verified: 4 parts are what was committed" in capsys.readouterr().out
    data = bytearray(path.read_bytes())
    data[data.index(b"p3") + 1] = ord("4")
    path.write_bytes(data)
    assert job_status(job.output).together.is_complete
    verified = job_status(job.output, verifies=True).together
    assert (verified.is_complete, verified.num_committed) == (False, 3)
    assert f"the SHA-256 of {path.name} is not" in verified.problems[0]
    assert main(["job", "status", job.output, "--verify"]) == 1
    assert "incomplete" in capsys.readouterr().out
    assert main(["job", "status", job.output, "--verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["is_complete"] is False


@pytest.mark.parametrize("output_format", ["jsonl", "parquet"])
def test_a_part_of_which_nothing_is_recorded_counts_if_its_rows_can_be_parsed(make_job, output_format):
    job = make_job(TEXT, output_format=output_format)
    run_job(job, make_llm=FakeLLM)
    folder = pathlib.Path(job.output)
    manifest, path = json.loads((folder / "manifest.json").read_text()), folder / f"part-00001.{output_format}"
    del manifest["parts"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    whole = path.read_bytes()
    path.write_bytes(whole[:50] + bytes(20) + whole[70:])
    with pytest.raises(JobError, match=rf"{path.name} should hold 3 whole rows and hold 3, of which one may be torn or damaged"):
        run_job(job, make_llm=NeverMade)
    assert job_status(job.output).together.num_committed == 3
    path.write_bytes(whole)
    assert run_job(job, make_llm=NeverMade).is_complete


def test_an_errors_file_that_is_missing_or_one_too_many_is_found(make_job):
    job = make_job(TEXT)
    run_job(job, make_llm=FakeLLM)
    folder = pathlib.Path(job.output)
    errors = (folder / "part-00000.errors.jsonl").read_bytes()
    (folder / "part-00000.errors.jsonl").unlink()
    with pytest.raises(JobError, match=r"part-00000.jsonl should hold 3 whole rows .* and hold 2 in \d+, for part-00000.errors.jsonl is missing"):
        run_job(job, make_llm=NeverMade)
    (folder / "part-00000.errors.jsonl").write_bytes(errors)
    (folder / "part-00001.errors.jsonl").write_bytes(errors)
    with pytest.raises(JobError, match=r"part-00001.errors.jsonl and .*part-00001.jsonl should hold 3 whole rows"):
        run_job(job, make_llm=NeverMade)


def test_errors_of_an_earlier_commit_go_when_no_row_fails_any_more(make_job, run_text):
    class Refuses(FakeLLM):
        def _output(self, number, prompt, params):
            return super()._output(number, "FAIL", params)
    job = make_job(rows_text(5))
    run_job(job, make_llm=Refuses)
    folder = pathlib.Path(job.output)
    for path in folder.glob("part-*[0-9].jsonl"):
        path.unlink()
    run_job(job, make_llm=FakeLLM)
    assert contents(folder) == contents(run_text(rows_text(5), output="whole"))


class Dies(DyingLLM):
    num_outputs = 7


@pytest.mark.parametrize("damage", [bytes, lambda data: data[:-9], lambda data: b"", lambda data: data + b"torn", lambda data: b"[" * 9 + data])
def test_a_job_that_was_interrupted_knows_its_parts_from_a_log_and_goes_on_without_one(make_job, run_text, damage):
    job = make_job(TEXT)
    with pytest.raises(RuntimeError):
        run_job(job, make_llm=Dies)
    folder = pathlib.Path(job.output)
    part = next(folder.glob("part-*[0-9].jsonl"))
    whole = part.read_bytes()
    part.write_bytes(whole[:-20])
    with pytest.raises(JobError, match=part.name):
        run_job(job, make_llm=NeverMade)
    assert not job_status(job.output).together.is_complete
    part.write_bytes(whole)
    (folder / COMMITS).write_bytes(damage((folder / COMMITS).read_bytes()))
    part.write_bytes(cut_at_a_line(whole))
    with pytest.raises(JobError, match=rf"{part.name} should hold 3 whole rows"):
        run_job(job, make_llm=NeverMade)
    part.write_bytes(whole)
    assert run_job(job, make_llm=FakeLLM).is_complete
    assert contents(folder) == contents(run_text(TEXT, output="whole"))


def test_the_manifest_of_a_complete_job_tells_of_every_file(run_text):
    folder = run_text(TEXT)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {int(name[5:10]): {} for name in manifest["parts"]}.keys() == part_files(folder).keys()
    assert list(manifest)[-1] == "parts"
    for files in part_files(folder).values():
        for name, record in record_of(files).items():
            assert manifest["parts"][name] == {"sha256": record.sha256, "num_bytes": record.num_bytes, "num_rows": record.num_rows}
    assert not (folder / COMMITS).exists()


@pytest.mark.parametrize("record", [None, 7, "text", {}, {"sha256": 3, "num_bytes": 1, "num_rows": 1},
                                    {"sha256": "a", "num_bytes": True, "num_rows": 1}, {"sha256": "a", "num_bytes": 1, "num_rows": 1, "more": 2}])
def test_a_damaged_record_in_the_manifest_is_said(make_job, record):
    job = make_job(TEXT)
    run_job(job, make_llm=FakeLLM)
    path = pathlib.Path(job.output) / "manifest.json"
    manifest = json.loads(path.read_text())
    for parts in ({**manifest["parts"], "part-00000.jsonl": record}, {"notes.txt": manifest["parts"]["part-00000.jsonl"]}, record or [3]):
        path.write_text(json.dumps({**manifest, "parts": parts}))
        with pytest.raises(JobError, match=r"the manifest is damaged|should hold"):
            run_job(job, make_llm=NeverMade)
        assert job_status(job.output).together.problems


@pytest.fixture
def shards(make_job):
    jobs = [make_job(TEXT, shard=f"{index}/2") for index in range(2)]
    for job in jobs:
        run_job(job, make_llm=FakeLLM)
    return jobs


@pytest.mark.parametrize("what", [*DAMAGE, "other rows"])
def test_a_merge_refuses_a_damaged_part_of_a_shard_and_of_its_own_output(shards, what, tmp_path):
    damage = {**DAMAGE, "other rows": other_rows}[what]
    output = tmp_path / "merged"
    merge_shards(str(output), [job.folder for job in shards])
    for folder, command in ((pathlib.Path(shards[0].folder), "the shard"), (output, "the job")):
        path = folder / "part-00002.jsonl"
        whole = path.read_bytes()
        path.unlink()  # the two may be names of one file
        path.write_bytes(damage(whole))
        with pytest.raises(JobError, match=rf"part-00002.jsonl should hold 3 whole rows .*or remove it and run {command} again"):
            merge_shards(str(output), [job.folder for job in shards])
        path.write_bytes(whole)
    (output / "part-00002.jsonl").unlink()
    assert merge_shards(str(output), [job.folder for job in shards]).num_new == 1


def test_shards_that_were_copied_without_their_logs_are_merged_by_their_rows(shards, tmp_path, run_text):
    for job in shards:
        path = pathlib.Path(job.folder) / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["parts"]
        path.write_text(json.dumps(manifest))
    merge_shards(str(tmp_path / "merged"), [job.folder for job in shards])
    assert contents(tmp_path / "merged") == contents(run_text(TEXT, output="whole"))


def test_a_damaged_part_is_not_copied_over_a_whole_one_far_away(make_job, tmp_path):
    job = dataclasses.replace(make_job(TEXT), output=f"file://{tmp_path}/far", work_dir=str(tmp_path / "work"))
    run_job(job, make_llm=FakeLLM)
    wanted = contents(tmp_path / "work")
    (tmp_path / "work" / "part-00001.jsonl").write_bytes(b"")
    assert run_job(job, make_llm=NeverMade).is_complete
    assert contents(tmp_path / "work") == contents(tmp_path / "far") == wanted
    for folder in ("work", "far"):
        (tmp_path / folder / "part-00001.jsonl").write_bytes(b"cut off")
    (tmp_path / "far" / "part-00002.jsonl").write_bytes(b"cut off")
    with pytest.raises(JobError, match=r"part-00001.jsonl.* should hold"):
        run_job(job, make_llm=NeverMade)
    shutil.rmtree(tmp_path / "work")
    (tmp_path / "far" / "part-00002.jsonl").write_bytes(wanted["part-00002.jsonl"])
    with pytest.raises(JobError, match=r"far/part-00001.jsonl has 7 bytes and should have \d+, as the manifest says"):
        run_job(job, make_llm=NeverMade)
    (tmp_path / "far" / "part-00001.jsonl").unlink()
    assert run_job(job, make_llm=FakeLLM).num_new == 3
    assert contents(tmp_path / "work") == contents(tmp_path / "far") == wanted


def test_a_parquet_part_is_read_for_its_rows_only_where_it_must_be(make_job, monkeypatch):
    job = make_job(TEXT, output_format="parquet")
    run_job(job, make_llm=FakeLLM)
    monkeypatch.setattr(pq, "read_table", lambda *_, **__: pytest.fail("a part is not read whole"))
    assert job_status(job.output).together.is_complete
