"""The input of a job: paths, globs, lists and URLs of JSONL files, compressed or not."""
import bz2
import contextlib
import functools
import gzip
import hashlib
import http.server
import itertools
import json
import lzma
import os
import pathlib
import sys
import threading

import fsspec
import pytest
from backports import zstd
from fsspec.registry import _registry

from tests.jobs.fake_llm import FakeLLM
from tests.jobs.small_job import all_errors, all_rows, contents, rows_text
from tpllm.errors import JobError
from tpllm.jobs.config import JobConfig, load_job
from tpllm.jobs.runner import run_job
from tpllm.jobs.sources.open import open_source

COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}
memory_numbers = itertools.count()


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """The working directory of a test: ``in_folder(name, text)`` writes a file there."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, data: str | bytes) -> pathlib.Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path
    return write


@pytest.fixture
def bucket():
    """A URL of its own in the file system that fsspec keeps in memory."""
    url = f"memory://test-{os.getpid()}-{next(memory_numbers)}"
    yield url
    with contextlib.suppress(FileNotFoundError):
        fsspec.filesystem("memory").rm(url.removeprefix("memory:/"), recursive=True)


def put(url: str, data: str | bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


def prompts(given) -> list[str]:
    return [json.loads(row.data)["prompt"] for row in open_source(given).rows()]


def row(prompt: str) -> str:
    return json.dumps({"prompt": prompt}) + "\n"


def test_a_glob_gives_its_files_in_the_order_of_their_names_and_only_files(in_folder):
    for name in ("data/b.jsonl", "data/a.jsonl", "data/deep/er/c.jsonl", "data/10.jsonl", "data/9.jsonl", "data/notes.txt"):
        in_folder(name, row(name))
    pathlib.Path("data/folder.jsonl").mkdir()
    assert prompts("data/*.jsonl") == ["data/10.jsonl", "data/9.jsonl", "data/a.jsonl", "data/b.jsonl"]
    assert prompts("data/**/*.jsonl") == ["data/10.jsonl", "data/9.jsonl", "data/a.jsonl", "data/b.jsonl", "data/deep/er/c.jsonl"]
    assert prompts("data/[ab].jsonl") == ["data/a.jsonl", "data/b.jsonl"]
    assert prompts(["data/b.jsonl", "data/?.jsonl"][:1]) == ["data/b.jsonl"]


def test_a_list_keeps_its_order_and_may_mix_paths_globs_and_urls(in_folder, bucket):
    in_folder("z.jsonl", row("z"))
    in_folder("data/1.jsonl", row("1"))
    in_folder("data/2.jsonl", row("2"))
    put(f"{bucket}/far.jsonl", row("far"))
    assert prompts(["z.jsonl", f"{bucket}/*.jsonl", "data/*.jsonl"]) == ["z", "far", "1", "2"]
    with pytest.raises(JobError, match=r"the input has memory:.*far.jsonl twice"):
        open_source([f"{bucket}/far.jsonl", f"{bucket}/*.jsonl"])


def test_a_file_whose_name_looks_like_a_glob_is_that_file(in_folder):
    in_folder("part[1].jsonl", row("brackets"))
    in_folder("part1.jsonl", row("no brackets"))
    assert prompts("part[1].jsonl") == ["brackets"]


def test_rows_are_numbered_through_and_know_file_and_line(in_folder):
    in_folder("a.jsonl", "\ufeff" + row("0") + "\n" + row("1").strip())
    in_folder("b.jsonl", "\n\n\ufeff".replace("\ufeff", "") + row("2"))
    rows = list(open_source(["a.jsonl", "b.jsonl"]).rows())
    assert [(raw.index, raw.file, raw.line) for raw in rows] == [(0, "a.jsonl", 1), (1, "a.jsonl", 3), (2, "b.jsonl", 3)]


def test_a_byte_order_mark_at_any_line_is_no_part_of_a_row(in_folder):
    in_folder("a.jsonl", "\ufeff" + row("0") + "\ufeff" + row("1") + "\ufeff\n" + "\ufeff\ufeff " + row("2") + row("\ufeff3"))
    in_folder("b.jsonl.gz", gzip.compress(("\ufeff" + row("4")).encode()) + gzip.compress(("\ufeff" + row("5")).encode()))
    assert prompts(["a.jsonl", "b.jsonl.gz"]) == ["0", "1", "2", "\ufeff3", "4", "5"]


def test_unwanted_rows_are_left_out_and_the_others_keep_their_numbers(in_folder):
    in_folder("a.jsonl", row("0") + row("1"))
    in_folder("b.jsonl", row("2") + row("3"))
    rows = open_source("*.jsonl").rows(lambda index: index in (1, 2))
    assert [(raw.index, raw.file) for raw in rows] == [(1, "a.jsonl"), (2, "b.jsonl")]


def test_several_files_make_the_job_that_one_of_all_their_rows_makes(in_folder, make_job):
    text = rows_text(11, bad=(4,))
    lines = text.splitlines(keepends=True)
    in_folder("in/1.jsonl", "".join(lines[:5]))
    in_folder("in/2.jsonl", "")
    in_folder("in/3.jsonl", "".join(lines[5:]))
    one, many = make_job(text, output="one"), JobConfig(model="fake", input="in/*.jsonl", output="many", rows_per_part=3)
    for job in (one, many):
        assert run_job(job, make_llm=FakeLLM).is_complete
    ours, theirs = contents(pathlib.Path("many")), contents(pathlib.Path("one"))
    assert all_errors(pathlib.Path("many"))[0]["file"] == "in/1.jsonl"
    for folder in (ours, theirs):
        del folder["manifest.json"], folder["part-00001.errors.jsonl"]
    assert ours == theirs


def test_the_manifest_tells_of_each_file_and_a_change_in_one_is_another_job(in_folder):
    in_folder("a.jsonl", row("a"))
    in_folder("b.jsonl", row("b") + row("c"))
    job = JobConfig(model="fake", input=["a.jsonl", "b.jsonl"], output="out")
    run_job(job, make_llm=FakeLLM)
    recorded = json.loads(pathlib.Path("out/manifest.json").read_text())["input"]
    assert recorded["num_rows"] == 3
    assert [(file["num_rows"], file["num_bytes"]) for file in recorded["files"]] == [(1, 16), (2, 32)]
    in_folder("b.jsonl", row("b") + row("d"))
    with pytest.raises(JobError, match=r"input\.files\.1\.sha256 was '[0-9a-f]{64}' and is now"):
        run_job(job, make_llm=FakeLLM)
    pathlib.Path("b.jsonl").unlink()
    with pytest.raises(JobError, match=r"cannot read the input b.jsonl: No such file \(paths are relative to the working directory"):
        run_job(job, make_llm=FakeLLM)


def test_two_rows_of_one_custom_id_in_two_files_are_refused_with_both_places(in_folder):
    in_folder("a.jsonl", row("x") + '{"custom_id": "same", "prompt": "y"}')
    in_folder("b.jsonl", '\n{"custom_id": "same", "prompt": "z"}')
    with pytest.raises(JobError, match=r"custom_id 'same' is on row 1 \(a.jsonl line 2\) and on row 2 \(b.jsonl line 2\)"):
        open_source("*.jsonl").scan()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_give_their_rows_also_from_several_streams(in_folder, suffix):
    compress = COMPRESS[suffix]
    in_folder(f"rows.jsonl{suffix}", compress(row("é").encode() + b'{"pro') + compress(b'mpt": "second"}\n' + row("third").encode()))
    assert prompts(f"rows.jsonl{suffix}") == ["é", "second", "third"]
    assert open_source(f"rows.jsonl{suffix}").scan().num_rows == 3


@pytest.mark.parametrize("suffix", COMPRESS)
def test_the_hash_of_a_compressed_file_is_of_the_bytes_that_are_stored(in_folder, suffix):
    data = COMPRESS[suffix](row("x").encode() * 50)
    in_folder(f"rows.jsonl{suffix}", data)
    file, = open_source(f"rows.jsonl{suffix}").scan().files
    assert (file.sha256, file.num_bytes, file.num_rows) == (hashlib.sha256(data).hexdigest(), len(data), 50)


def test_the_hash_covers_what_a_decompressor_leaves_unread(in_folder):
    data = bz2.compress(row("x").encode()) + b"something else" * 500_000  # which bzip2 ignores
    in_folder("rows.jsonl.bz2", data)
    file, = open_source("rows.jsonl.bz2").scan().files
    assert (file.sha256, file.num_bytes, file.num_rows) == (hashlib.sha256(data).hexdigest(), len(data), 1)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", [lambda data: data[:-5], lambda data: b"not compressed at all"])
def test_a_damaged_compressed_file_is_refused_before_anything_is_run(in_folder, suffix, damage):
    in_folder(f"rows.jsonl{suffix}", damage(COMPRESS[suffix](b"".join(row(str(i)).encode() for i in range(5000)))))
    with pytest.raises(JobError, match=rf"cannot read the input rows.jsonl{suffix}: \w"):
        run_job(JobConfig(model="fake", input=f"rows.jsonl{suffix}", output="out"), make_llm=None)
    assert not list(pathlib.Path("out").glob("part*"))


def test_zstandard_without_its_package_names_the_package(in_folder, monkeypatch):
    in_folder("rows.jsonl.zst", b"")
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    with pytest.raises(JobError, match=r"pip install backports.zstd"):
        open_source("rows.jsonl.zst")


@pytest.mark.parametrize(("given", "message"), [
    ("none.jsonl", r"cannot read the input none.jsonl: No such file \(paths are relative to the working directory, here "),
    ("none/*.jsonl", r"no file matches the input none/\*.jsonl"),
    (["here.jsonl", "none-?.jsonl"], r"no file matches the input none-\?.jsonl"),
    (["here.jsonl", "*.jsonl"], r"the input has here.jsonl twice"),
    (["here.jsonl", "./here.jsonl"], r"the input has ./here.jsonl twice"),
    ("folder", r"cannot read the input folder: it is a folder; write folder/\*.jsonl, \*.csv or \*.parquet"),
    ("table.tsv", r"cannot read the input table.tsv: it must be JSONL or CSV \(also .gz, .bz2, .xz or .zst\), or Parquet"),
    ("rows.jsonl.zip", r"it must be JSONL"),
    ("table.tsv.gz", r"it must be JSONL"),
    ("table.parquet.gz", r"Parquet \(which compresses inside\)"),
    (["here.jsonl", "table.parquet"], r"two kinds: here.jsonl is jsonl and table.parquet is parquet"),
    ("zz://bucket/rows.jsonl", r"cannot open zz://bucket/rows.jsonl: Protocol not known: zz; known protocols are s3, gs, hf"),
    ("memory://nowhere/rows.jsonl", r"cannot read the input memory://nowhere/rows.jsonl: No such file"),
    ("memory://nowhere/*.jsonl", r"no file matches the input memory://nowhere/\*.jsonl"),
])
def test_an_input_that_cannot_be_is_refused(in_folder, given, message):
    for name in ("here.jsonl", "table.tsv", "rows.jsonl.zip", "table.tsv.gz", "table.parquet.gz", "table.parquet"):
        in_folder(name, row("x"))
    pathlib.Path("folder").mkdir()
    with pytest.raises(JobError, match=message):
        open_source(given)


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("https", "aiohttp"), ("abfs", "adlfs")])
def test_a_protocol_without_its_package_names_the_package(monkeypatch, protocol, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(_registry, protocol, raising=False)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    with pytest.raises(JobError, match=rf"cannot open {protocol}://bucket/rows.jsonl: .* pip install {package}$"):
        open_source(f"{protocol}://bucket/rows.jsonl")


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(in_folder, monkeypatch):
    monkeypatch.setattr("tpllm.jobs.sources.line_rows.MAX_LINE_BYTES", 1 << 20)
    in_folder("rows.jsonl", row("x") + '{"prompt": "' + "x" * (2 << 20))
    with pytest.raises(JobError, match=r"rows.jsonl: line 2 is longer than 1 MiB; write one row a line"):
        open_source("rows.jsonl").scan()


def test_files_in_memory_and_behind_file_urls_run_like_local_ones(in_folder, bucket, make_job):
    text = rows_text(8, bad=(2,))
    local = make_job(text, output="local")
    put(f"{bucket}/rows.jsonl.gz", gzip.compress(text.encode()))
    jobs = [local, *(JobConfig(model="fake", input=given, output=f"out-{number}", rows_per_part=3)
                     for number, given in enumerate((f"{bucket}/rows.jsonl.gz", f"{bucket}/*.gz", f"file://{local.input}")))]
    for job in jobs:
        assert run_job(job, make_llm=FakeLLM).is_complete
        assert all_rows(pathlib.Path(job.output)) == all_rows(pathlib.Path("local"))
        assert all_errors(pathlib.Path(job.output))[0]["line"] == 3
    assert [all_errors(pathlib.Path(f"out-{number}"))[0]["file"] for number in range(3)] == [
        f"{bucket}/rows.jsonl.gz", f"{bucket}/rows.jsonl.gz".replace("memory://", "memory:///"), f"file://{local.input}"]


@pytest.mark.parametrize("is_remote", [False, True])
def test_any_file_that_changes_while_the_job_runs_is_noticed(in_folder, bucket, is_remote):
    names = [f"{bucket}/a.jsonl", f"{bucket}/b.jsonl"] if is_remote else ["a.jsonl", "b.jsonl"]
    for number, name in enumerate(names):
        text = "".join(row(f"{number} {i}") for i in range(9))
        put(name, text) if is_remote else in_folder(name, text)

    class Meddler(FakeLLM):
        def generate_iter(self, *arguments, **options):
            put(names[1], "".join(row(f"2 {i}") for i in range(9))) if is_remote else os.utime(names[1], (5, 5))
            return super().generate_iter(*arguments, **options)
    with pytest.raises(JobError, match=r"the input .*b.jsonl changed while the job ran"):
        run_job(JobConfig(model="fake", input=names, output="out"), make_llm=Meddler)


@pytest.fixture
def web(in_folder, tmp_path):
    """The address of a web server over the test's folder."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_rows_come_from_a_web_address_whose_query_is_no_glob(in_folder, web):
    in_folder("rows.jsonl", row("far") + row("away"))
    assert prompts(f"{web}/rows.jsonl?download=true") == ["far", "away"]
    assert open_source(f"{web}/rows.jsonl").scan().num_rows == 2
    with pytest.raises(JobError, match=r"cannot read the input http://.*/none.jsonl"):
        open_source(f"{web}/none.jsonl")


def test_a_file_behind_a_web_address_that_changes_is_noticed(in_folder, web):
    in_folder("rows.jsonl", row("far"))
    rows = open_source(f"{web}/rows.jsonl").rows()
    next(rows)
    in_folder("rows.jsonl", row("far and changed"))
    with pytest.raises(JobError, match=r"changed while the job ran"):
        list(rows)


@pytest.mark.parametrize(("yaml", "words", "wanted"), [
    ("a.jsonl", [], "a.jsonl"), ("[a.jsonl, 'b/*.jsonl']", [], ["a.jsonl", "b/*.jsonl"]), ("a.jsonl", ["--input", "[x, y]"], ["x", "y"]),
    ("a.jsonl", ["--input", "[ab].jsonl"], "[ab].jsonl"), ("a.jsonl", ["--input=7"], "7"),
])
def test_an_input_is_text_or_a_list(in_folder, yaml, words, wanted):
    path = in_folder("job.yaml", f"model: demo\ninput: {yaml}\noutput: out\n")
    assert load_job(path, words).input == wanted


@pytest.mark.parametrize(("given", "message"), [("3", "input is 3; it must be a path"), ("[]", r"input is \[\]; give at least one file"),
                                                ("[a, 3]", r"input is \['a', 3\]; it must be"), ("[a, '']", "no empty name"),
                                                ("' '", "input is empty"), ("{a: b}", "it must be a path")])
def test_an_input_of_another_type_is_refused(in_folder, given, message):
    path = in_folder("job.yaml", f"model: demo\ninput: {given}\noutput: out\n")
    with pytest.raises(JobError, match=message):
        load_job(path)
