"""CSV input: what is a row, what is refused, and that a job over it is as one over JSONL."""
import gzip
import json
import pathlib

import pytest

from tests.jobs.fake_llm import DyingLLM, FakeLLM
from tests.jobs.small_job import all_errors, all_rows, contents
from tpllm.errors import JobError
from tpllm.jobs.config import JobConfig
from tpllm.jobs.runner import run_job
from tpllm.jobs.sources.open import open_source


@pytest.fixture
def write(tmp_path, monkeypatch):
    """``write(name, text)``: a file in the test's working directory."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, data: str | bytes) -> None:
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return write


def rows(given) -> list[dict]:
    return [json.loads(row.data) for row in open_source(given).rows()]


TABLE = 'custom_id,prompt,note\r\na,"two\nlines, and a ""quote""",é\r\n\r\n,p1,\r\nb,p2,"x\r\ny"\r\n'
WANTED = [{"custom_id": "a", "prompt": 'two\nlines, and a "quote"', "note": "é"}, {"custom_id": None, "prompt": "p1", "note": ""},
          {"custom_id": "b", "prompt": "p2", "note": "x\r\ny"}]


@pytest.mark.parametrize(("name", "data"), [("a.csv", TABLE), ("a.CSV", "\ufeff" + TABLE), ("a.csv.gz", gzip.compress(("\ufeff" + TABLE).encode()))])
def test_quoted_line_breaks_a_byte_order_mark_and_blank_lines_are_read_and_rows_know_their_first_line(write, name, data):
    write(name, data)
    assert rows(name) == WANTED
    source = open_source(name)
    assert source.scan().num_rows == 3
    assert [(row.index, row.line) for row in source.rows()] == [(0, 2), (1, 5), (2, 6)]


def test_cells_of_keys_that_are_no_text_are_json_and_others_stay_text(write):
    write("a.csv", 'messages,sampling,prompt_token_ids,score\n'
          '"[{""role"": ""user"", ""content"": ""hi""}]","{""n"": 2}",,7\n,,"[1, 2]",\n,broken,[3],\n')
    assert rows("a.csv") == [
        {"messages": [{"role": "user", "content": "hi"}], "sampling": {"n": 2}, "prompt_token_ids": None, "score": "7"},
        {"messages": None, "sampling": None, "prompt_token_ids": [1, 2], "score": ""},
        {"messages": None, "sampling": "broken", "prompt_token_ids": [3], "score": ""}]


def test_a_field_may_be_longer_than_pythons_own_limit(write):
    write("a.csv", "prompt\n" + "x" * 200_000 + "\n")
    assert len(rows("a.csv")[0]["prompt"]) == 200_000


@pytest.mark.parametrize(("data", "message"), [
    ("prompt,note\na,b\n\n\"c\nd\",e\nf,g,h\n", r"a.csv: line 6 has 3 fields and the header has 2; quote a field that holds commas"),
    ("prompt,note\na\n", r"a.csv: line 2 has 1 fields and the header has 2"),
    ("prompt,note\na,b\n\"c\nd,e\nf,g\n", r"a.csv: the row that begins on line 3 is not CSV: unexpected end of data; quote a field"),
    ("prompt,note\n\"a\"b,c\n", r"the row that begins on line 2 is not CSV: ',' expected"),
    (b"prompt\nfine\nb\xffd\n", r"a.csv: line 3 is not UTF-8: invalid start byte at byte 1; save the file as UTF-8"),
    ("", r"a.csv: it has no header; name the columns in its first line"),
    ("prompt,a,a\n", r"a.csv: it has several columns called 'a'; rename them"),
])
def test_what_is_no_table_is_refused_before_anything_runs_with_its_line(write, data, message):
    write("a.csv", data)
    with pytest.raises(JobError, match=message):
        run_job(JobConfig(model="fake", input="a.csv", output="out"), make_llm=None)


def test_tables_of_the_same_columns_in_any_order_make_one_input_and_others_are_refused(write):
    write("a.csv", "prompt,note\np0,n0\n")
    write("b.csv", "note,prompt\nn1,p1\n")
    assert rows("*.csv") == [{"prompt": "p0", "note": "n0"}, {"note": "n1", "prompt": "p1"}]
    write("c.csv", "prompt\np2\n")
    with pytest.raises(JobError, match=r"different columns: c.csv has 'prompt', and a.csv has 'prompt', 'note'"):
        open_source("*.csv")
    write("d.jsonl", "{}")
    with pytest.raises(JobError, match=r"two kinds: a.csv is csv and d.jsonl is jsonl"):
        open_source(["a.csv", "d.jsonl"])


def csv_job(**keys) -> JobConfig:
    return JobConfig(**{"model": "fake", "input": "rows.csv", "output": "out", "rows_per_part": 3, "engine": {"max_num_seqs": 3}, **keys})


def test_a_job_over_a_table_is_the_job_over_the_same_rows_of_text_also_when_it_is_resumed(write):
    write("rows.csv", "prompt,note\n" + "".join(f"p{i},\"n\n{i}\"\n" for i in range(11)) + ",empty\n")
    write("rows.jsonl", "".join(json.dumps({"prompt": f"p{i}", "note": f"n\n{i}"}) + "\n" for i in range(11)) + '{"prompt": "", "note": "empty"}\n')
    with pytest.raises(RuntimeError, match="the engine is gone"):
        run_job(csv_job(), make_llm=DyingLLM)
    assert 0 < run_job(csv_job(), make_llm=FakeLLM).num_new < 12
    run_job(csv_job(input="rows.jsonl", output="wanted"), make_llm=FakeLLM)
    assert all_rows(pathlib.Path("out")) == all_rows(pathlib.Path("wanted"))
    failed, = all_errors(pathlib.Path("out"))
    assert (failed["row"], failed["file"], failed["line"]) == (11, "rows.csv", 24)
    run_job(csv_job(output="whole"), make_llm=FakeLLM)
    assert contents(pathlib.Path("out")) == contents(pathlib.Path("whole"))


def test_a_table_that_changes_while_the_job_runs_is_noticed(write):
    write("rows.csv", "prompt\n" + "".join(f"p{i}\n" for i in range(9)))

    class Meddler(FakeLLM):
        def generate_iter(self, *arguments, **options):
            write("rows.csv", "prompt\n" + "".join(f"q{i}\n" for i in range(9)))
            return super().generate_iter(*arguments, **options)
    with pytest.raises(JobError, match=r"the input rows.csv changed while the job ran"):
        run_job(csv_job(), make_llm=Meddler)


def test_a_table_may_be_answered_in_parquet(write):
    pq = pytest.importorskip("pyarrow.parquet")
    write("rows.csv", "prompt,note,sampling\np0,n0,\np1,,\"{\"\"n\"\": 2}\"\n")
    run_job(csv_job(output_format="parquet"), make_llm=FakeLLM)
    table = pq.read_table("out/part-00000.parquet")
    assert (table["note"].to_pylist(), table["sampling"].to_pylist()) == (["n0", ""], [None, '{"n": 2}'])
    assert [len(outputs) for outputs in table["outputs"].to_pylist()] == [1, 2]
