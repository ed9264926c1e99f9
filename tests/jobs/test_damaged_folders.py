"""Whatever stands in an output folder, or in its place, is one clear error or does no harm."""
import json
import os
import pathlib
import random
import zlib

import pytest

from tests.jobs.fake_llm import DyingLLM, FakeLLM
from tests.jobs.small_job import all_rows, contents, rows_text
from tpllm.cli.main import main
from tpllm.errors import JobError
from tpllm.jobs.dry_run.run import dry_run
from tpllm.jobs.merge import merge_shards
from tpllm.jobs.outputs.journal import FinishedRow, encode
from tpllm.jobs.runner import run_job
from tpllm.jobs.status import job_status

TEXT = rows_text(11)


class Dies(DyingLLM):
    num_outputs = 7


@pytest.fixture
def half_done(make_job):
    job = make_job(TEXT)
    with pytest.raises(RuntimeError, match="gone"):
        run_job(job, make_llm=Dies)
    return job


DEEP = ['{"job": ' * 100_000, '{"job": ' * 900 + "1" + "}" * 900, "[" * 100_000, '{"job": {}, "input": ' + "[" * 60 + "]" * 60 + "}"]
ODD = ["", "\0" * 50, "null", "7", '"text"', "[]", "{}", '{"job": null, "input": null}', '{"job": {"rows_per_part": "3"}, "input": {"num_rows": 11}}',
       '{"job": {"rows_per_part": 3}, "input": {"num_rows": true}}', '{"job": {"rows_per_part": 3}, "input": {"num_rows": 1e400}}',
       '{"job": {"rows_per_part": 1}, "input": {"num_rows": 1' + "0" * 400 + "}}", "\ufeff{}"]


@pytest.mark.parametrize("text", [*DEEP, *ODD], ids=lambda text: text[:30].replace("\0", "0") or "empty")
def test_a_manifest_of_any_content_is_one_error_in_every_command(half_done, text, capsys):
    (pathlib.Path(half_done.output) / "manifest.json").write_text(text)
    before = contents(pathlib.Path(half_done.output))
    for look in (lambda: run_job(half_done, make_llm=FakeLLM), lambda: dry_run(half_done, make_llm=FakeLLM)):
        with pytest.raises(JobError, match=r"manifest|belongs to another job"):
            look()
    assert job_status(half_done.output).together.problems
    assert main(["job", "status", half_done.output]) == 0
    assert contents(pathlib.Path(half_done.output)) == before
    with pytest.raises(JobError, match=r"manifest"):
        merge_shards(str(pathlib.Path(half_done.output).parent / "merged"), [half_done.output])


@pytest.mark.parametrize("history", ["text", 7, {"a": 1}, ["x"], [None]])
def test_a_history_that_is_none_is_said(half_done, history):
    path = pathlib.Path(half_done.output) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "environment_changes": history}))
    with pytest.raises(JobError, match=r"manifest.json is damaged: environment_changes is no list of objects"):
        run_job(half_done, make_llm=FakeLLM)


def test_a_manifest_cut_or_changed_at_any_byte_is_an_error_or_the_same(half_done, run_text):
    path, draw = pathlib.Path(half_done.output) / "manifest.json", random.Random(3)
    whole = path.read_bytes()
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(draw.choice([bytes(damaged), whole[:draw.randrange(len(whole))]]))
        job_status(half_done.output)
        try:
            result = run_job(half_done, make_llm=Dies)
        except (JobError, RuntimeError):
            continue
        assert result.is_complete
    path.write_bytes(whole)
    assert run_job(half_done, make_llm=FakeLLM).is_complete
    assert all_rows(pathlib.Path(half_done.output)) == all_rows(run_text(TEXT, output="whole"))


def record(index: int, payload: bytes = b'{"custom_id": "mine"}') -> bytes:
    return encode(FinishedRow(index, False, payload))


def with_checksum(body: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(body), body)


JOURNALS = {
    "garbage": {"journal-00003.jsonl": os.urandom(3000)}, "zeros": {"journal-00003.jsonl": bytes(5000)}, "empty": {"journal-00003.jsonl": b""},
    "rows of another part": {"journal-00003.jsonl": record(0) + record(1) + record(2)},
    "a part that is not there": {"journal-00099.jsonl": b"", "journal-00098.jsonl": record(98 * 3)},
    "a name of too many digits": {"journal-000003.jsonl": record(9) + record(10), "journal-0000000000003.jsonl": record(9)},
    "a row of too many digits": {"journal-00003.jsonl": with_checksum(b"9" * 5000 + b" row {}")},
    "a huge line": {"journal-00003.jsonl": b"x" * 3_000_000},
    "deep payload": {"journal-00003.jsonl": with_checksum(b"0 row " + b"[" * 100_000)},
}


@pytest.mark.parametrize("what", JOURNALS)
def test_a_journal_of_any_content_costs_no_row_and_brings_none(make_job, run_text, what):
    wanted = contents(run_text(TEXT, output="whole"))
    job = make_job(TEXT)

    class DiesAtOnce(FakeLLM):
        def generate_iter(self, *arguments, **options):
            raise RuntimeError("the engine is gone")
            yield
    with pytest.raises(RuntimeError):
        run_job(job, make_llm=DiesAtOnce)
    folder = pathlib.Path(job.output)
    for name, data in JOURNALS[what].items():
        (folder / name).write_bytes(data)
    job_status(job.output, counts_tokens=True)
    assert run_job(job, make_llm=FakeLLM).is_complete
    found = contents(folder)
    left = {name for name in found if name.startswith("journal")}
    assert {name: data for name, data in found.items() if name not in left} == wanted
    assert left <= JOURNALS[what].keys()


@pytest.mark.parametrize("name", ["manifest.json", "journal-00000.jsonl", "part-00000.jsonl", "part-00000.errors.jsonl", "commits.jsonl"])
def test_a_folder_where_a_file_should_be_is_one_error_or_left_alone(make_job, name):
    job = make_job(TEXT)
    (pathlib.Path(job.output) / name).mkdir(parents=True)
    try:
        assert run_job(job, make_llm=FakeLLM).is_complete
    except JobError as error:
        assert name.partition(".")[0] in str(error)  # noqa: PT017
    try:
        job_status(job.output)
    except JobError as error:
        assert str(error)  # noqa: PT017


def test_an_output_that_is_a_file_or_a_link_to_nothing_is_refused_and_kept(make_job, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, message in (("file", "is a file"), ("file/deeper", "file is a file"), ("dangling", "is a link to .*nowhere, where no folder is"),
                          ("dangling/deeper", "is a link to .*nowhere, where no folder is"), ("loop", "is a link to .*loop, where no folder is")):
        job = make_job(TEXT, output=name)
        for look in (lambda job=job: run_job(job, make_llm=FakeLLM), lambda job=job: dry_run(job, make_llm=FakeLLM)):
            with pytest.raises(JobError, match=rf"cannot write to the output folder .*{message}; move it away, or give this job another output"):
                look()
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(JobError, match=r"the output folder .*file is a file; give the output folder of a job"):
        job_status(str(tmp_path / "file"))
    with pytest.raises(JobError, match=r"file"):
        merge_shards(str(tmp_path / "merged"), [str(tmp_path / "file")])


def test_an_output_that_is_a_link_to_a_folder_is_that_folder(make_job, run_text, tmp_path):
    wanted = contents(run_text(TEXT, output="whole"))
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there", target_is_directory=True)
    job = make_job(TEXT, output="link")
    with pytest.raises(RuntimeError):
        run_job(job, make_llm=Dies)
    assert run_job(make_job(TEXT, output="there"), make_llm=FakeLLM).is_complete
    assert run_job(job, make_llm=FakeLLM).num_new == 0
    assert job_status(job.output, verifies=True).together.is_complete
    assert contents(tmp_path / "there") == wanted
    assert (tmp_path / "link").is_symlink()
    shards = [make_job(TEXT, output="link-shards", shard=f"{index}/2") for index in range(2)]
    (tmp_path / "shards").mkdir()
    (tmp_path / "link-shards").symlink_to(tmp_path / "shards", target_is_directory=True)
    for shard in shards:
        run_job(shard, make_llm=FakeLLM)
    merge_shards(shards[0].output)
    assert contents(tmp_path / "shards") == wanted
