"""No row is ever made of another content than the one that was scanned, whatever becomes of a file while its job runs."""
import bz2
import contextlib
import dataclasses
import functools
import gzip
import io
import itertools
import json
import logging
import lzma
import os
import pathlib

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from tests.jobs.fake_llm import FakeLLM
from tests.jobs.small_job import contents
from tpllm.errors import JobError
from tpllm.jobs.config import JobConfig
from tpllm.jobs.outputs.journal import JOURNAL_NAME, journal_rows
from tpllm.jobs.runner import run_job
from tpllm.jobs.sources.open import open_source
from tpllm.jobs.sources.verified import BLOCK_BYTES, Digest, VerifiedFile

NUM_ROWS = 40
COMPRESS = {"": bytes, ".gz": functools.partial(gzip.compress, mtime=0), ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}
numbers = itertools.count()


def jsonl(word: str, num_rows: int = NUM_ROWS) -> bytes:
    return b"".join(json.dumps({"prompt": f"{word} {i:03}"}).encode() + b"\n" for i in range(num_rows))


def parquet(word: str, num_rows: int = NUM_ROWS) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"prompt": [f"{word} {i:03}" for i in range(num_rows)]})
    pq.write_table(table, sink, row_group_size=4, compression="none", use_dictionary=False)
    return sink.getvalue().to_pybytes()


KINDS = {**{f"rows.jsonl{suffix}": lambda word, num_rows=NUM_ROWS, compress=compress: compress(jsonl(word, num_rows))
            for suffix, compress in COMPRESS.items()}, "rows.parquet": parquet}


def move_over(path: pathlib.Path, data: bytes) -> None:
    path.with_name("new").write_bytes(data)
    os.replace(path.with_name("new"), path)


def write_over(path: pathlib.Path, data: bytes) -> None:
    path.write_bytes(data)


def write_over_unseen(path: pathlib.Path, data: bytes) -> None:
    """In place, size and times kept: only the bytes tell."""
    status = path.stat()
    with path.open("r+b") as file:
        file.write(data[:status.st_size].ljust(status.st_size, b"\n"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def meddling(act, *, after: int):
    """An engine beside which something happens once a number of rows are finished."""
    class Meddler(FakeLLM):
        def generate_iter(self, *arguments, **options):
            if after == 0:
                act()
            for number, output in enumerate(super().generate_iter(*arguments, **options), 1):
                yield output
                if number == after:
                    act()
    return Meddler


def written_rows(folder: pathlib.Path) -> list[bytes]:
    """All finished rows, of parts and of journals."""
    if list(folder.glob("*.parquet")):
        return [json.dumps(row).encode() for path in folder.glob("*.parquet") for row in pq.read_table(path).select(["prompt"]).to_pylist()]
    parts = [line for path in folder.glob("part-?????.jsonl") for line in path.read_bytes().splitlines()]
    return parts + [row.line for path in folder.iterdir() if JOURNAL_NAME.fullmatch(path.name) for row in journal_rows(path)]


@pytest.fixture(autouse=True)
def small_reads(monkeypatch, tmp_path):
    """Files of a few KB are read in several pieces, as large ones are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tpllm.jobs.sources.verified.BLOCK_BYTES", 128)
    monkeypatch.setattr("tpllm.jobs.sources.files.BUFFER_BYTES", 128)


@pytest.mark.parametrize("name", KINDS)
def test_no_row_comes_from_a_file_that_took_the_place_of_the_scanned_one(tmp_path, name):
    make, path, whole = KINDS[name], tmp_path / name, {}
    for change, after, rows_per_part in ((move_over, 0, 3), (move_over, 9, 100), (write_over, 1, 3), (write_over_unseen, 1, 100),
                                         (write_over_unseen, 9, 3)):
        path.write_bytes(make("old"))
        job = JobConfig(model="fake", input=name, output=f"out-{next(numbers)}", rows_per_part=rows_per_part, engine={"max_num_seqs": 2})
        where, folder = f"{change.__name__} after {after} rows, {rows_per_part} a part", pathlib.Path(job.output)
        # What was read when it changed may all have been the scanned content; then the rows are right, and no wrong one must be among them.
        with contextlib.suppress(JobError) as _:
            run_job(job, make_llm=meddling(lambda change=change: change(path, make("NEW")), after=after))
        assert not any(b"NEW" in line for line in written_rows(folder)), where
        with pytest.raises(JobError, match=r"belongs to another job: input\.files\.0\.(num_bytes|sha256) was|cannot read the input"):
            run_job(job, make_llm=FakeLLM)
        path.write_bytes(make("old"))
        assert run_job(job, make_llm=FakeLLM).is_complete, where
        if rows_per_part not in whole:
            run_job(dataclasses.replace(job, output=f"whole-{rows_per_part}"), make_llm=FakeLLM)
            whole[rows_per_part] = contents(pathlib.Path(f"whole-{rows_per_part}"))
        assert contents(folder) == whole[rows_per_part], where


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_changed_after_the_scan_ends_the_job_before_its_first_row(tmp_path, name):
    make, path = KINDS[name], tmp_path / name
    for change in (move_over, write_over, write_over_unseen):
        path.write_bytes(make("old"))
        job = JobConfig(model="fake", input=name, output=f"out-{next(numbers)}", rows_per_part=3)
        with pytest.raises(JobError, match=rf"the input {name} changed while the job ran: it had \d+ bytes of SHA-256 [0-9a-f]{{12}}\.\.\. when it "
                                           "was scanned; what is written belongs to the old content: restore it to go on, or give the new content"):
            run_job(job, make_llm=meddling(lambda change=change: change(path, make("NEW")), after=0))
        assert written_rows(pathlib.Path(job.output)) == []


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_a_change_after_all_rows_were_read_is_noticed_at_the_next_part(tmp_path, name):
    path, make = tmp_path / name, KINDS[name]
    path.write_bytes(make("old"))
    job = JobConfig(model="fake", input=name, output="out", output_format="jsonl", rows_per_part=3, engine={"max_num_seqs": NUM_ROWS + 1})
    with pytest.raises(JobError, match="changed while the job ran"):
        run_job(job, make_llm=meddling(lambda: move_over(path, make("NEW")), after=7))
    assert len(list(pathlib.Path("out").glob("part-*"))) < NUM_ROWS // 3


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_a_file_that_was_replaced_by_its_own_content_is_told_of_and_the_next_run_goes_on(tmp_path, name):
    path, make = tmp_path / name, KINDS[name]
    path.write_bytes(make("old"))
    for change in (move_over, write_over, lambda path, data: os.utime(path, (1, 1))):
        job = JobConfig(model="fake", input=name, output=f"out-{next(numbers)}", rows_per_part=3, engine={"max_num_seqs": 2})
        with pytest.raises(JobError, match="changed while the job ran"):
            run_job(job, make_llm=meddling(lambda change=change: change(path, make("old")), after=20))
        result = run_job(job, make_llm=FakeLLM)
        assert result.is_complete
        assert result.num_new < NUM_ROWS - 15
        assert len(written_rows(pathlib.Path(job.output))) == NUM_ROWS


@pytest.mark.parametrize("name", KINDS)
def test_no_row_comes_from_a_remote_file_that_took_the_place_of_the_scanned_one(name):
    make, bucket = KINDS[name], f"memory://changed-{os.getpid()}-{next(numbers)}"

    def put(word: str, num_rows: int = NUM_ROWS) -> None:
        with fsspec.open(f"{bucket}/{name}", "wb") as file:
            file.write(make(word, num_rows))
    for after in (0, 5):
        put("old")
        job = JobConfig(model="fake", input=f"{bucket}/{name}", output=f"out-{next(numbers)}", rows_per_part=3)
        with pytest.raises(JobError, match=r"the input memory://.* changed while the job ran"):
            run_job(job, make_llm=meddling(lambda: put("NEW"), after=after))
        assert not any(b"NEW" in line for line in written_rows(pathlib.Path(job.output)))
        put("old")
        assert run_job(job, make_llm=FakeLLM).is_complete


def test_a_remote_file_that_tells_neither_size_nor_time_is_compared_by_its_bytes(monkeypatch, caplog):
    url = f"memory://silent-{os.getpid()}/rows.jsonl"
    monkeypatch.setattr("tpllm.jobs.sources.files.STAMP_KEYS", ("size",))

    def put(word: str) -> None:
        with fsspec.open(url, "wb") as file:
            file.write(jsonl(word))
    put("old")
    with pytest.raises(JobError, match="changed while the job ran"):
        run_job(JobConfig(model="fake", input=url, output="out"), make_llm=meddling(lambda: put("NEW"), after=0))
    assert written_rows(pathlib.Path("out")) == []


def test_a_file_that_grows_while_the_job_runs_is_noticed_and_no_row_of_it_is_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    for after in (0, 9):
        path.write_bytes(jsonl("old"))
        job = JobConfig(model="fake", input="rows.jsonl", output=f"out-{after}", rows_per_part=3, engine={"max_num_seqs": 2})

        def append() -> None:
            with path.open("ab") as file:
                file.write(b'{"prompt": "NEW"}\n')
        with pytest.raises(JobError, match="changed while the job ran"):
            run_job(job, make_llm=meddling(append, after=after))
        assert not any(b"NEW" in line for line in written_rows(pathlib.Path(job.output)))


def test_the_second_of_several_files_is_watched_too_and_a_file_more_is_another_job(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(name))
    job = JobConfig(model="fake", input="*.jsonl", output="out", rows_per_part=3)
    with pytest.raises(JobError, match=r"the input b.jsonl changed"):
        run_job(job, make_llm=meddling(lambda: write_over_unseen(tmp_path / "b.jsonl", jsonl("c")), after=3))
    (tmp_path / "b.jsonl").write_bytes(jsonl("b"))
    (tmp_path / "c.jsonl").write_bytes(jsonl("c"))
    with pytest.raises(JobError, match=r"belongs to another job: the number of input\.files was 2 and is now 3"):
        run_job(job, make_llm=FakeLLM)
    (tmp_path / "c.jsonl").unlink()
    assert run_job(job, make_llm=FakeLLM).is_complete


def test_what_the_scan_itself_saw_is_what_the_rows_are_made_of(tmp_path):
    """A Parquet file is hashed first and decoded then; between the two it may be replaced as well."""
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet("old"))
    source = open_source("rows.parquet")
    write_over_unseen(path, parquet("NEW"))
    assert source.scan().num_rows == NUM_ROWS
    assert all(b"NEW" in row.data for row in source.rows())
    write_over_unseen(path, parquet("old"))
    with pytest.raises(JobError, match="changed"):
        list(source.rows())


def test_a_pipe_is_refused_since_an_input_is_read_twice(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(JobError, match=r"cannot read the input rows.jsonl: it is a pipe or a device.*write it to a file first"):
        open_source("rows.jsonl")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_of_no_bytes_is_refused_while_one_of_no_rows_is_not(tmp_path, suffix):
    (tmp_path / f"rows.jsonl{suffix}").write_bytes(b"")
    with pytest.raises(JobError, match=rf"cannot read the input rows.jsonl{suffix}: "):
        open_source(f"rows.jsonl{suffix}").scan()
    (tmp_path / f"rows.jsonl{suffix}").write_bytes(COMPRESS[suffix](b""))
    assert open_source(f"rows.jsonl{suffix}").scan().num_rows == 0


@pytest.mark.parametrize("suffix", [".bz2", ".xz"])
def test_what_is_left_out_behind_the_last_compressed_stream_is_told_of(tmp_path, suffix, caplog):
    (tmp_path / f"rows.jsonl{suffix}").write_bytes(COMPRESS[suffix](jsonl("old")) + jsonl("plain"))
    with caplog.at_level(logging.WARNING, logger="tpllm"):
        assert open_source(f"rows.jsonl{suffix}").scan().num_rows == NUM_ROWS
    assert "goes on behind its last compressed stream" in caplog.text


def test_a_verified_file_gives_any_piece_of_what_was_seen_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("tpllm.jobs.sources.verified.BLOCK_BYTES", BLOCK_BYTES)
    path = tmp_path / "bytes"
    for size in (0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES, 5 * BLOCK_BYTES + 77):
        data, digest = os.urandom(size), Digest()
        for start in range(0, size, 50_000):
            digest.update(data[start:start + 50_000])
        path.write_bytes(data)

        def refuse():
            raise JobError("changed")

        def read_at(start: int, length: int, digest=digest) -> bytes:
            with io.BufferedReader(VerifiedFile(path.open("rb"), digest, refuse)) as file:
                file.seek(start)
                return file.read(length)
        for start, length in ((0, size + 1), (0, 1), (size // 2, 70_000), (max(size - 5, 0), 50), (size, 9), (size + 9, 9), (1, BLOCK_BYTES)):
            assert read_at(start, length) == data[start:start + length]
        changed = [data + b"x", *([data[:-1]] if size else ())]
        changed += [data[:place] + bytes([data[place] ^ 1]) + data[place + 1:] for place in ({0, size // 2, size - 1} if size else ())]
        for other in changed:
            path.write_bytes(other)
            with pytest.raises(JobError):
                read_at(0, size + 1)
