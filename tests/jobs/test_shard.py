"""A shard is made of whole parts, and the shards of a job are the job."""
import dataclasses
import json
import pathlib

import pytest

from tests.jobs.fake_llm import FakeLLM
from tests.jobs.small_job import contents, rows_text
from tpllm.errors import JobError
from tpllm.jobs.runner import run_job
from tpllm.jobs.shard import MAX_SHARDS, WHOLE, Parts, Shard, parse_shard
from tpllm.jobs.sources.row_source import RowSource

TEXT = rows_text(11, bad=(1, 7))


class NeverMade(FakeLLM):
    def __init__(self, *_, max_num_seqs=4, **__):
        raise AssertionError("no model is needed")


@pytest.mark.parametrize(("text", "shard"), [("0/1", Shard(0, 1)), ("3/4", Shard(3, 4)), ("007/010", Shard(7, 10)),
                                             (f"{MAX_SHARDS - 1}/{MAX_SHARDS}", Shard(MAX_SHARDS - 1, MAX_SHARDS))])
def test_a_shard_is_written_as_its_index_and_their_number(text, shard):
    assert parse_shard(text) == shard
    assert parse_shard(str(shard)) == shard


@pytest.mark.parametrize(("text", "message"), [
    ("4/4", r"shard is '4/4'; the first number must be from 0 to 3"),
    ("1/1", r"the first number must be 0"),
    ("0/0", r"the number of shards, 0, must be from 1 to 100000"),
    ("0/100001", r"the number of shards, 100001, must be from 1 to 100000"),
    ("-1/4", r"must be i/n"), ("1/-4", r"must be i/n"), ("1", r"must be i/n"), ("1/2/3", r"must be i/n"), ("1 / 2", r"must be i/n"),
    ("a/b", r"must be i/n"), ("", r"must be i/n"), ("1.0/2", r"must be i/n"), (3, r"shard is 3; it must be i/n"), (True, r"must be i/n"),
])
def test_what_is_no_shard_is_refused_with_the_limit(make_job, text, message):
    with pytest.raises(JobError, match=message):
        make_job(TEXT, shard=text)


@pytest.mark.parametrize("num_rows", [0, 1, 5, 6, 11])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_parts_of_all_shards_are_those_of_the_job_each_once(num_rows, count):
    whole = Parts(num_rows, 3)
    shards = [Parts(num_rows, 3, Shard(index, count)) for index in range(count)]
    assert sorted(part for shard in shards for part in shard.numbers) == list(whole.numbers)
    assert [row for part in whole.numbers for row in whole.rows(part)] == list(range(num_rows))
    assert sum(shard.num_rows for shard in shards) == num_rows
    assert all(shard.num_rows == sum(map(shard.size, shard.numbers)) for shard in shards)
    assert sum(shard.is_empty for shard in shards) == (num_rows == 0)
    assert whole.shard is WHOLE


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_files_of_the_shards_are_those_of_the_unsharded_job(make_job, run_text, count):
    wanted = contents(run_text(TEXT, output="whole"))
    found, parts = {}, {}
    for index in range(count):
        job = make_job(TEXT, shard=f"{index}/{count}")
        result = run_job(job, make_llm=FakeLLM)
        folder = pathlib.Path(job.output) / f"shard-{index:05d}-of-{count:05d}"
        assert result.output == job.folder == str(folder)
        assert result.num_new == result.num_rows > 0
        files = contents(folder)
        manifest = json.loads(files.pop("manifest.json"))
        assert manifest["job"].pop("shard") == f"{index}/{count}"
        parts |= manifest["parts"]
        assert manifest["parts"].keys() == files.keys()
        assert {**manifest, "parts": None} == {**json.loads(wanted["manifest.json"]), "parts": None}
        assert not found.keys() & files.keys()
        found |= files
    assert found == {name: data for name, data in wanted.items() if name != "manifest.json"}
    assert parts == json.loads(wanted["manifest.json"])["parts"]
    assert not list(pathlib.Path(job.output).glob("*.jsonl*"))


def test_an_interrupted_shard_goes_on_with_its_own_rows(make_job):
    class Dies(FakeLLM):
        def generate_iter(self, *arguments, **options):
            for number, output in enumerate(super().generate_iter(*arguments, **options)):
                if number == 2:
                    raise RuntimeError("the engine is gone")
                yield output
    job = make_job(TEXT, shard="0/2")
    with pytest.raises(RuntimeError, match="gone"):
        run_job(job, make_llm=Dies)
    result = run_job(job, make_llm=FakeLLM)
    assert (result.num_rows, result.num_done, result.num_new) == (6, 6, 2)  # parts 0 and 2; rows 1 and 7 are no JSON
    assert run_job(job, make_llm=NeverMade).num_new == 0


def test_rows_of_other_shards_are_not_handed_out_by_the_source(make_job, monkeypatch):
    seen, real = [], RowSource.rows

    def spied(source, *arguments):
        for row in real(source, *arguments):
            seen.append(row.index)
            yield row
    monkeypatch.setattr(RowSource, "rows", spied)
    run_job(make_job(rows_text(11), shard="1/2"), make_llm=FakeLLM)
    assert seen == [3, 4, 5, 9, 10]


def test_a_shard_without_parts_is_complete_at_once_and_says_what_would_give_it_some(make_job, caplog):
    job = make_job(TEXT, shard="5/6")
    result = run_job(job, make_llm=NeverMade)
    assert (result.num_rows, result.is_complete) == (0, True)
    assert "shard 5/6 has nothing to do: 11 rows make 4 parts of 3 rows; rows_per_part 1 would give each of the 6 shards some" in caplog.text
    assert set(contents(pathlib.Path(job.folder))) == {"manifest.json"}
    assert run_job(job, make_llm=NeverMade).is_complete


@pytest.mark.parametrize(("num_rows", "count"), [(11, 6), (11, 11), (100, 7), (7, 4), (1000, 999)])
def test_the_rows_per_part_that_is_named_does_give_each_shard_some(num_rows, count):
    for index in range(count):
        assert Parts(num_rows, num_rows // count, Shard(index, count)).num_rows > 0


def test_more_shards_than_rows_are_told_to_be_fewer(make_job, caplog):
    run_job(make_job(TEXT, shard="19/20"), make_llm=NeverMade)
    assert "use at most 11 shards" in caplog.text


def test_an_empty_input_is_the_first_shards(make_job):
    for index in range(2):
        job = make_job("", shard=f"{index}/2")
        assert run_job(job, make_llm=FakeLLM if index == 0 else NeverMade).is_complete
        assert (pathlib.Path(job.folder) / "part-00000.jsonl").exists() == (index == 0)


def test_the_folder_of_another_shard_is_refused(make_job):
    job = make_job(TEXT, shard="0/2")
    run_job(job, make_llm=FakeLLM)
    other = dataclasses.replace(job, shard="1/2")
    pathlib.Path(job.folder).rename(other.folder)
    with pytest.raises(JobError, match=r"belongs to another job: shard was '0/2' and is now '1/2'"):
        run_job(other, make_llm=NeverMade)


def test_the_folder_of_an_unsharded_job_is_refused(make_job):
    job = make_job(TEXT, shard="0/2")
    run_job(dataclasses.replace(job, output=job.folder, shard=None), make_llm=FakeLLM)
    with pytest.raises(JobError, match=r"belongs to another job: shard was \(absent\) and is now '0/2'"):
        run_job(job, make_llm=NeverMade)


def test_zeros_before_a_number_make_no_other_shard(make_job):
    run_job(make_job(TEXT, shard="0/2"), make_llm=FakeLLM)
    assert run_job(make_job(TEXT, shard="00/02"), make_llm=NeverMade).is_complete


@pytest.mark.parametrize(("first", "second", "message"), [
    (None, "0/2", r"holds a job that is not sharded, or whose shards are merged"),
    ("0/2", None, r"holds shards of a job \(shard-00000-of-00002\); put them together with 'tpllm job merge .*out'"),
    ("0/2", "1/3", r"holds shards of another number \(shard-00000-of-00002\), and this is shard 1/3"),
])
def test_one_output_holds_either_the_job_or_one_number_of_shards(make_job, first, second, message):
    run_job(make_job(TEXT, shard=first), make_llm=FakeLLM)
    job = make_job(TEXT, shard=second)
    with pytest.raises(JobError, match=message):
        run_job(job, make_llm=NeverMade)
    assert first is None or not (pathlib.Path(job.output) / "manifest.json").exists()
