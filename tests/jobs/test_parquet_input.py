"""Rows from Parquet files."""
import dataclasses
import http.server
import json
import os
import pathlib
import re
import sys
import threading

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.jobs.fake_llm import FakeLLM
from tests.jobs.small_job import all_errors, all_rows, contents, rows_text
from tpllm.errors import JobError
from tpllm.jobs.config import JobConfig
from tpllm.jobs.runner import run_job
from tpllm.jobs.sources import parquet
from tpllm.jobs.sources.open import open_source


@pytest.fixture
def write(tmp_path, monkeypatch):
    """``write(name, columns, row_group_size=...)``: a Parquet file in the test's own working directory."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, columns: dict | pa.Table, **options) -> str:
        pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), name, **options)
        return name
    return write


def job(given, output="out", **keys) -> JobConfig:
    return JobConfig(**{"model": "fake", "input": given, "output": output, "rows_per_part": 3, "engine": {"max_num_seqs": 3}, **keys})


def numbers(count: int, start: int = 0) -> dict:
    return {"prompt": [f"p{i}" for i in range(start, start + count)], "number": list(range(start, start + count))}


def test_rows_are_numbered_through_files_and_row_groups_and_know_their_place(write):
    write("a.parquet", numbers(7), row_group_size=3)
    write("b.parquet", numbers(2, start=7))
    source = open_source("*.parquet")
    rows = list(source.rows())
    assert [json.loads(row.data) for row in rows] == [{"prompt": f"p{i}", "number": i} for i in range(9)]
    assert [row.index for row in rows] == list(range(9))
    assert [row.place for row in rows[6:8]] == [{"file": "a.parquet", "file_row": 6}, {"file": "b.parquet", "file_row": 0}]
    assert [(file.num_rows, file.num_bytes) for file in source.scan().files] == [(n, os.path.getsize(name)) for n, name in
                                                                                ((7, "a.parquet"), (2, "b.parquet"))]


def test_only_wanted_rows_are_given_and_only_their_row_groups_are_read(write, monkeypatch):
    write("a.parquet", numbers(8), row_group_size=2)
    groups = []
    real = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda self, size, row_groups, **options: groups.extend(row_groups) or real(
        self, size, row_groups=row_groups, **options))
    assert [(row.index, json.loads(row.data)["number"]) for row in open_source("a.parquet").rows({1, 5}.__contains__)] == [(1, 1), (5, 5)]
    assert groups == [0, 2]


def test_the_job_is_that_of_the_same_rows_as_jsonl(write, make_job):
    rows = [json.loads(line) for line in rows_text(11).splitlines()]
    rows[4] = {"prompt": ""}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    columns = {key: [row.get(key) for row in rows] for key in ("custom_id", "messages", "note")}
    columns["prompt"] = [row["prompt"] if isinstance(row.get("prompt"), str) else None for row in rows]
    columns["prompt_token_ids"] = [row["prompt"] if isinstance(row.get("prompt"), list) else None for row in rows]
    columns["sampling"] = [row.get("sampling") for row in rows]
    run_job(job(write("rows.parquet", columns), output_format="jsonl"), make_llm=FakeLLM)
    run_job(make_job(text, output="wanted"), make_llm=FakeLLM)
    ours, theirs = all_rows(pathlib.Path("out")), all_rows(pathlib.Path("wanted"))
    for row, twin in zip(ours, theirs, strict=True):
        assert (row["custom_id"], row["usage"], row.get("note")) == (twin["custom_id"], twin["usage"], twin.get("note"))
        if "sampling" not in twin:  # a list of ids has another name there, and so another answer of the fake engine
            assert row["outputs"] == twin["outputs"]
    assert [len(row["outputs"]) for row in ours] == [2 if row.get("sampling") else 1 for row in ours]
    error, = all_errors(pathlib.Path("out"))
    assert (error["row"], error["file"], error["file_row"], error["custom_id"]) == (4, "rows.parquet", 4, "4")
    assert error["input"]["prompt"] == ""


class Recorder(FakeLLM):
    seen: list

    def generate_iter(self, requests, *, on_error):
        pairs = list(requests)
        type(self).seen = [(prompt, params.temperature, params.top_k) for prompt, params in pairs]
        return super().generate_iter(pairs, on_error=on_error)


MESSAGES = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("columns", [
    {"messages": [MESSAGES], "sampling": [{"temperature": 0.25, "top_k": 3}]},
    {"messages": [json.dumps(MESSAGES)], "sampling": [json.dumps({"temperature": 0.25, "top_k": 3})]},
    {"messages": pa.array([[{**MESSAGES[0], "name": None}]], pa.list_(pa.struct([(key, pa.string()) for key in ("role", "content", "name")]))),
     "sampling": pa.array([{"temperature": 0.25, "top_k": 3, "min_p": None}], pa.struct(
         [("temperature", pa.float64()), ("top_k", pa.int64()), ("min_p", pa.float64())]))},
    {"messages": pa.array([json.dumps(MESSAGES)]).dictionary_encode(), "prompt": pa.nulls(1), "prompt_token_ids": pa.nulls(1),
     "sampling": [{"temperature": 0.25, "top_k": 3}]},
])
def test_messages_and_sampling_are_columns_of_lists_and_structs_or_of_json_text(write, columns):
    run_job(job(write("a.parquet", columns)), make_llm=Recorder)
    assert Recorder.seen == [({"messages": MESSAGES}, 0.25, 3)]


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint16(), 2)])
@pytest.mark.parametrize("name", ["prompt", "prompt_token_ids"])
def test_token_ids_are_a_column_of_lists(write, kind, name):
    run_job(job(write("a.parquet", {name: pa.array([[1, 2]], kind)})), make_llm=Recorder)
    assert Recorder.seen == [({"prompt_token_ids": [1, 2]}, 0.5, 0)]


def test_template_kwargs_may_be_a_map(write):
    columns = {"messages": [MESSAGES], "template_kwargs": pa.array([[("thinking", "off")]], pa.map_(pa.string(), pa.string()))}
    run_job(job(write("a.parquet", columns)), make_llm=Recorder)
    assert Recorder.seen[0][0] == {"messages": MESSAGES, "template_kwargs": {"thinking": "off"}}


@pytest.mark.parametrize(("columns", "message"), [
    ({"sampling": ["{torn"], "prompt": ["a"]}, r"sampling is \"{torn\"; it must be an object"),
    ({"sampling": [{"temprature": 1}], "prompt": ["a"]}, r"did you mean 'sampling.temperature'"),
    ({"prompt": [1.5]}, r"prompt is 1.5; it must be text"),
    ({"text": ["a"]}, r"the row has 'text' and no prompt"),
    ({"prompt": pa.nulls(1, pa.string())}, r"no prompt"),
    ({"custom_id": [True], "prompt": ["a"]}, r"custom_id is true; it must be text or a number"),
])
def test_a_bad_row_becomes_an_error_line(write, columns, message):
    run_job(job(write("a.parquet", columns)), make_llm=FakeLLM)
    error, = all_errors(pathlib.Path("out"))
    assert re.search(message, error["error"])
    assert (error["row"], error["file_row"]) == (0, 0)


def damage_page(data: bytes) -> bytes:
    return data[:60] + bytes(len(data) // 2 - 60) + data[len(data) // 2:]


@pytest.mark.parametrize(("damage", "message"), [
    (lambda data: b"not Parquet at all", "magic bytes not found"),
    (lambda data: b"", "file size is 0 bytes"),
    (lambda data: data[:-20], "magic bytes not found"),
    (lambda data: data[:len(data) // 2], "magic bytes not found"),
    (lambda data: data[-400:], "."),
    (damage_page, "."),
])
def test_parquet_that_cannot_be_read_is_refused_before_anything_is_run(write, damage, message):
    write("a.parquet", numbers(1000))
    path = pathlib.Path(write("b.parquet", numbers(1000)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(JobError, match=rf"cannot read the input b.parquet: .*{message}"):
        run_job(job("*.parquet"), make_llm=None)
    assert not list(pathlib.Path().glob("out/*.*json*"))


def test_text_that_is_not_utf8_is_refused_before_anything_is_run(write):
    text = pa.array([b"good", b"\xff"]).view(pa.string())
    write("a.parquet", {"prompt": text})
    with pytest.raises(JobError, match=r"cannot read the input a.parquet: .*Invalid UTF8 sequence"):
        open_source("a.parquet").scan()


@pytest.mark.parametrize(("columns", "message"), [
    ({"prompt": [1], "number": [1]}, r"'prompt' is int64 instead of string in b.parquet, against a.parquet"),
    ({"prompt": ["x"]}, r"'number' is missing in b.parquet"),
    ({"prompt": ["x"], "number": [1], "more": [1]}, r"'more' is one more in b.parquet"),
    ({"prompt": ["x"], "number": pa.array([1], pa.int32())}, r"'number' is int32 instead of int64 in"),
    ({"prompt": ["x"], "other": [1]}, r"'number' is missing; 'other' is one more in b.parquet, against a.parquet; make their columns the same"),
])
def test_files_of_different_columns_are_refused_with_file_and_column(write, columns, message):
    write("a.parquet", numbers(2))
    write("b.parquet", columns)
    with pytest.raises(JobError, match=r"the input files have different columns: .*" + message):
        open_source("*.parquet")


def test_the_order_of_the_columns_and_whether_they_may_be_null_make_no_difference(write):
    write("a.parquet", pa.table(numbers(2), schema=pa.schema([("prompt", pa.string()), pa.field("number", pa.int64(), nullable=False)])))
    write("b.parquet", {"number": [2, None], "prompt": ["p2", "p3"]})
    run_job(job("*.parquet"), make_llm=FakeLLM)
    parts = pa.concat_tables(map(pq.read_table, sorted(pathlib.Path("out").glob("*.parquet"))))
    assert parts["number"].to_pylist() == [0, 1, 2, None]
    assert parts["prompt"].to_pylist() == ["p0", "p1", "p2", "p3"]


def test_two_columns_of_one_name_are_refused(write):
    write("a.parquet", pa.table([pa.array(["x"]), pa.array(["y"])], names=["prompt", "prompt"]))
    with pytest.raises(JobError, match=r"a.parquet: it has several columns called 'prompt'; rename them"):
        open_source("a.parquet")


def test_a_column_that_has_no_form_in_json_is_refused_with_file_and_column(write):
    write("a.parquet", {"prompt": ["x"], "views": pa.array([[1]], pa.list_view(pa.timestamp("us")))})
    with pytest.raises(JobError, match=r"cannot read the input a.parquet: column 'views' is list_view.* leave it out"):
        open_source("a.parquet")


def test_without_pyarrow_the_package_is_named(write, monkeypatch):
    write("a.parquet", numbers(1))
    pathlib.Path("a.jsonl").write_text('{"prompt": "x"}')
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for refused in (job("a.parquet"), job("a.jsonl", output_format="parquet")):
        with pytest.raises(JobError, match=r"Parquet needs a package: pip install pyarrow \(or 'tpllm\[parquet\]'\)"):
            run_job(refused, make_llm=FakeLLM)
    assert run_job(job("a.jsonl"), make_llm=FakeLLM).is_complete


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_two_rows_of_one_custom_id_are_refused(write, kind):
    write("a.parquet", {"custom_id": pa.array(["a", None, "b"], kind), "prompt": ["x"] * 3})
    write("b.parquet", {"custom_id": pa.array(["c", "1"], kind), "prompt": ["x"] * 2})
    with pytest.raises(JobError, match=r"custom_id '1' is on row 1 \(a.parquet row 1\) and on row 4 \(b.parquet row 1\)"):
        open_source("*.parquet").scan()


def test_ids_of_any_type_are_told_apart(write):
    """Numbers, and what becomes text on its way to a row, such as a date."""
    for kind, values in ((pa.int64(), [7, 8, 7]), (pa.float64(), [7.0, 8.5, 7.0]), (pa.date32(), [1, 2, 1])):
        write("a.parquet", {"custom_id": pa.array(values, kind), "prompt": ["x"] * 3})
        with pytest.raises(JobError, match=r"custom_id .* is on row 0 \(a.parquet row 0\) and on row 2 \(a.parquet row 2\)"):
            open_source("a.parquet").scan()


def test_a_file_that_changes_while_the_job_runs_is_noticed_before_a_part_takes_in_the_change(write):
    write("a.parquet", numbers(9))

    class Meddler(FakeLLM):
        def generate_iter(self, *arguments, **options):
            write("a.parquet", numbers(9, start=100))
            return super().generate_iter(*arguments, **options)
    with pytest.raises(JobError, match=r"the input a.parquet changed while the job ran"):
        run_job(job("a.parquet"), make_llm=Meddler)
    assert not list(pathlib.Path("out").glob("part-*.parquet"))


def test_a_file_in_memory_runs_like_a_local_one(write):
    write("a.parquet", numbers(9), row_group_size=4)
    url = f"memory://parquet-{os.getpid()}/a.parquet"
    with fsspec.open(url, "wb") as file:
        file.write(pathlib.Path("a.parquet").read_bytes())
    run_job(job("a.parquet"), make_llm=FakeLLM)
    run_job(job(url, output="far"), make_llm=FakeLLM)
    near, far = contents(pathlib.Path("out")), contents(pathlib.Path("far"))
    manifests = [json.loads(files.pop("manifest.json")) for files in (near, far)]
    assert [manifest.pop("paths")["input"] for manifest in manifests] == ["a.parquet", url]
    assert far == near
    assert manifests[0] == manifests[1]


class Ranges(http.server.BaseHTTPRequestHandler):
    """A web server for one file, ``a.parquet``, that gives the ranges that are asked for, and notes them."""

    asked: list[int]

    def do_HEAD(self):
        data = pathlib.Path("a.parquet").read_bytes()
        start, _, stop = self.headers.get("Range", f"bytes=0-{len(data) - 1}").removeprefix("bytes=").partition("-")
        piece = data[int(start):int(stop) + 1]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(piece)))
        self.send_header("Content-Range", f"bytes {start}-{stop}/{len(data)}")
        self.end_headers()
        return piece

    def do_GET(self):
        piece = self.do_HEAD()
        self.asked.append(len(piece))
        self.wfile.write(piece)

    def log_message(self, *_):
        pass


def test_a_file_behind_a_web_address_is_read_in_ranges_and_not_over_and_over(write, monkeypatch):
    write("a.parquet", {"prompt": [os.urandom(1500).hex() for _ in range(4000)], "more": [os.urandom(1500).hex() for _ in range(4000)]})
    monkeypatch.setattr(Ranges, "asked", [], raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        far = open_source(f"http://127.0.0.1:{server.server_port}/a.parquet")
        assert [row.data for row in far.rows()] == [row.data for row in open_source("a.parquet").rows()]
        server.shutdown()
        thread.join()
    assert sum(Ranges.asked) < 1.5 * os.path.getsize("a.parquet")


@pytest.mark.parametrize("kept_bytes", [0, 200, 1 << 20])
def test_any_slice_is_the_tables_in_any_order(write, monkeypatch, kept_bytes):
    monkeypatch.setattr(parquet, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(parquet, "MAX_BATCH_ROWS", 2)
    kinds = pa.schema([("prompt", pa.string()), ("number", pa.int64())])
    tables = [pa.table(numbers(count, start), schema=kinds) for start, count in ((0, 7), (7, 0), (7, 5), (12, 1))]
    for number, table in enumerate(tables):
        write(f"{number}.parquet", table, row_group_size=3)
    source, whole = open_source("*.parquet"), pa.concat_tables(tables)
    for start, stop in [(0, 3), (3, 4), (1, 9), (12, 13), (0, 13), (6, 8), (9, 12), (8, 10), (2, 3), (11, 13), (11, 11)]:
        assert source.slice(start, stop).to_pylist() == whole.slice(start, stop - start).to_pylist(), (start, stop)


def test_a_row_group_is_cut_into_batches_of_a_bounded_size(write):
    write("a.parquet", {"prompt": [os.urandom(50_000).hex() for _ in range(500)]}, row_group_size=500)
    sizes = [batch.nbytes for _, batch in open_source("a.parquet").files[0].batches()]
    assert len(sizes) > 5
    assert max(sizes) <= 2 * parquet.BATCH_BYTES


def test_changing_only_the_row_groups_changes_the_hash_but_a_copy_is_the_same_job(write):
    write("a.parquet", numbers(9))
    first = job("a.parquet")
    run_job(first, make_llm=FakeLLM)
    pathlib.Path("copy.parquet").write_bytes(pathlib.Path("a.parquet").read_bytes())
    assert run_job(dataclasses.replace(first, input="copy.parquet"), make_llm=FakeLLM).num_new == 0
    write("a.parquet", numbers(9), row_group_size=2)
    with pytest.raises(JobError, match=r"input\.files\.0\.num_bytes was \d+ and is now \d+"):
        run_job(first, make_llm=FakeLLM)
