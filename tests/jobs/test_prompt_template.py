"""``prompt_template`` makes prompts of rows' fields; ``limit`` runs the first rows only."""
import json
import pathlib

import pytest

from tests.jobs.fake_llm import FakeLLM
from tests.jobs.small_job import all_errors, all_rows, contents
from tpllm.errors import JobError
from tpllm.jobs.config import JobConfig
from tpllm.jobs.manifest import parts_of
from tpllm.jobs.prompt_template import render
from tpllm.jobs.runner import run_job
from tpllm.jobs.sources.open import open_source


class Listening(FakeLLM):
    """Keeps the prompts that it is asked for."""

    def __init__(self, model, *, max_num_seqs=4, **options):
        super().__init__(model, max_num_seqs=max_num_seqs, **options)
        self.seen = type(self).seen = []

    def generate_iter(self, requests, **options):
        def noted():
            for prompt, params in requests:
                self.seen.append(prompt)
                yield prompt, params
        return super().generate_iter(noted(), **options)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """``make(name, text, **keys)``: a job over that file, in the test's working directory."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, text: str, **keys) -> JobConfig:
        (tmp_path / name).write_text(text)
        return JobConfig(**{"model": "fake", "input": name, "output": "out", "engine": {"max_num_seqs": 3}, **keys})
    return make


@pytest.mark.parametrize(("template", "wanted"), [
    ("Summarize: {text}", "Summarize: {a} b"), ("{text}{text}", "{a} b{a} b"), ("{{text}} {text}", "{text} {a} b"), ("{n}|{x}|{yes}", "7|1.5|true"),
    ("{list}", '["é", 1]'), ("{a b}", "spaced"), ("{a.b}{a[0]}", "dottedindexed"),
])
def test_fields_are_named_in_braces_and_braces_are_written_twice(template, wanted):
    fields = {"text": "{a} b", "n": 7, "x": 1.5, "yes": True, "list": ["é", 1], "a b": "spaced", "a.b": "dotted", "a[0]": "indexed"}
    assert render(template, fields) == wanted


@pytest.mark.parametrize(("template", "message"), [
    ("no field", r"prompt_template is 'no field', the same prompt for every row; name a field of the rows, as in \{text\}"),
    ("{text", r"prompt_template is '\{text': expected '}' before end of string; a field is its name in braces"),
    ("a } b {text}", r"Single '}' encountered in format string; .* write \{\{ and \}\} for braces of the text"),
    ('{"answer": 1} {text}', r"it has \{\"answer\": 1\}; a field is its name"), ("{} {text}", r"it has \{\}; a field is"),
    ("{text!r}", r"it has \{text!r\}"), ("", "prompt_template is empty"), (3, "prompt_template is 3; it must be text"),
])
def test_a_template_that_is_none_is_refused_with_the_job(make, template, message):
    with pytest.raises(JobError, match=message):
        make("rows.jsonl", "", prompt_template=template)


@pytest.mark.parametrize(("name", "text"), [("rows.jsonl", '{"text": "a", "id": 1}\n{"text": "b", "id": 2}\n'), ("rows.csv", "text,id\na,1\nb,2\n"),
                                            ("rows.parquet", None)])
def test_each_row_gets_its_prompt_and_keeps_its_fields(make, name, text):
    job = make(name, text or "", prompt_template="Say {text}{id}")
    if text is None:
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.table({"text": ["a", "b"], "id": [1, 2]}), name)
    run_job(JobConfig(**{**vars(job), "output_format": "jsonl"}), make_llm=Listening)
    assert Listening.seen == ["Say a1", "Say b2"]
    assert [row["text"] for row in all_rows(pathlib.Path("out"))] == ["a", "b"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_a_field_that_is_no_column_is_refused_before_anything_runs_with_the_columns(make, name):
    job = make(name, "text,id\na,1\n", prompt_template="Say {txt}")
    if name == "rows.parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.table({"text": ["a"], "id": [1]}), name)
    with pytest.raises(JobError, match=r"prompt_template asks for \{txt\}; did you mean 'text'\? the input has 'text', 'id'"):
        run_job(job, make_llm=None)


BATCH = {"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"prompt": "p"}}


@pytest.mark.parametrize(("row", "message"), [
    ({"txt": "a", "id": 1}, "prompt_template asks for {text}; did you mean 'txt'? the row has 'txt', 'id'"),
    ({}, "prompt_template asks for {text}; the row has no fields"),
    ({"text": None}, "prompt_template asks for {text}, which is null in this row"),
    ({"text": "a", "prompt": "b"}, "the row has prompt, and the job's prompt_template makes the prompt; name it there as {prompt}, or leave"),
    ({"text": "a", "messages": []}, "the row has messages, and the job's prompt_template makes the prompt"),
    ({"text": "\ud800"}, "prompt holds half of a surrogate pair"),
])
def test_a_row_that_the_template_does_not_fit_is_in_the_errors_file_with_its_fields(make, row, message):
    run_job(make("rows.jsonl", json.dumps(row) + '\n{"text": "fine"}\n', prompt_template="Say {text}"), make_llm=FakeLLM)
    failed, = all_errors(pathlib.Path("out"))
    assert message in failed["error"]


def test_a_batch_row_has_its_own_prompt_and_a_prompt_may_be_a_field(make):
    run_job(make("rows.jsonl", json.dumps(BATCH) + '\n{"prompt": "p"}\n', prompt_template="Q: {prompt} A:"), make_llm=Listening)
    assert Listening.seen == ["Q: p A:"]
    failed, = all_errors(pathlib.Path("out"))
    assert "leave prompt_template out of the job" in failed["response"]["body"]["error"]["message"]


TEXT = "".join(json.dumps({"prompt": f"p{i}", "custom_id": str(i % 7)}) + "\n" for i in range(9))


def test_another_template_or_limit_is_another_job_and_the_same_goes_on(make):
    job = make("rows.jsonl", TEXT.replace("custom_id", "group"), prompt_template="{prompt}", limit=5)
    assert run_job(job, make_llm=FakeLLM).num_new == 5
    assert run_job(job, make_llm=None).num_new == 0
    for change, message in (({"limit": 6}, "limit was 5 and is now 6"), ({"limit": None}, r"limit was 5 and is now \(absent\)"),
                            ({"prompt_template": "{prompt} "}, "prompt_template was '{prompt}' and is now '{prompt} '")):
        with pytest.raises(JobError, match=message):
            run_job(JobConfig(**{**vars(job), **change}), make_llm=None)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_a_limit_runs_the_first_rows_of_all_files_and_reads_no_more_of_them(make, name):
    stem, suffix = name.split(".")
    for number in (1, 2):
        values = [f"p{4 * number + i}" for i in range(4)]
        if suffix == "parquet":
            pa = pytest.importorskip("pyarrow")
            make("other", "")
            pytest.importorskip("pyarrow.parquet").write_table(pa.table({"prompt": values}), f"{stem}{number}.parquet")
        else:
            make(f"{stem}{number}.{suffix}", "prompt\n" + "\n".join(values) if suffix == "csv" else
                 "".join(json.dumps({"prompt": value}) + "\n" for value in values))
    source = open_source(f"rows?.{suffix}", limit=6)
    assert source.scan().num_rows == 6
    assert [json.loads(row.data)["prompt"] for row in source.rows()] == [f"p{i}" for i in range(4, 10)]
    asked = []
    assert not list(source.rows(lambda index: asked.append(index) or False))
    assert max(asked) == 5


def test_only_the_rows_within_a_limit_have_to_have_ids_of_their_own_and_parts_end_there(make):
    job = make("rows.jsonl", TEXT, limit=7, rows_per_part=3)
    run_job(job, make_llm=FakeLLM)
    assert [row["custom_id"] for row in all_rows(pathlib.Path("out"))] == list("0123456")
    manifest = json.loads(contents(pathlib.Path("out"))["manifest.json"])
    assert (manifest["input"]["num_rows"], manifest["input"]["files"][0]["num_rows"], len(parts_of(manifest).numbers)) == (7, 9, 3)
    with pytest.raises(JobError, match="custom_id '0' is on row 0"):
        run_job(make("rows.jsonl", TEXT, limit=8, output="other"), make_llm=None)


@pytest.mark.parametrize(("keys", "message"), [({"limit": 0}, "limit is 0; it must be from 1 to"), ({"limit": 2.5}, "limit is 2.5; it must be a"),
                                               ({"max_failures": -1}, "max_failures is -1; it must be from 0 to")])
def test_a_number_of_rows_out_of_its_range_is_refused(make, keys, message):
    with pytest.raises(JobError, match=message):
        make("rows.jsonl", "", **keys)
