"""Parts as Parquet, of Parquet and of JSONL input."""
import dataclasses
import itertools
import json
import math
import os
import pathlib
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.jobs.fake_job_process import NoSleepLLM, kill, start, wait_for
from tests.jobs.fake_llm import FakeLLM
from tests.jobs.faulty_disk import MOMENTS, Death, PowerLossDisk, QuickDisk
from tests.jobs.small_job import all_errors, all_rows, contents, rows_text
from tests.jobs.test_parquet_as_json import CASES
from tpllm.engine.outputs import Logprob
from tpllm.errors import JobError
from tpllm.jobs.config import JobConfig, load_job
from tpllm.jobs.outputs import parquet_parts
from tpllm.jobs.outputs.part_files import num_rows_of, part_files
from tpllm.jobs.runner import run_job
from tpllm.jobs.sources import column_types, parquet

REPOSITORY = pathlib.Path(__file__).parents[2]
OWN = ["custom_id", "outputs", "prompt_logprobs", "usage"]


def parquet_job(tmp_path, columns: dict | pa.Table, *, output="out", **keys) -> JobConfig:
    path = tmp_path / "rows.parquet"
    if not path.exists():
        pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, row_group_size=4)
    return JobConfig(**{"model": "fake", "input": str(path), "output": str(tmp_path / output), "rows_per_part": 3,
                        "engine": {"max_num_seqs": 3}, **keys})


def read(folder: str | pathlib.Path) -> pa.Table:
    """All parts as one table; they must have one schema."""
    tables = [pq.read_table(files.rows) for files in part_files(pathlib.Path(folder)).values()]
    assert len({str(table.schema) for table in tables}) == 1
    return pa.concat_tables(tables)


def rows_columns(num_rows: int, *, bad: tuple[int, ...] = ()) -> dict:
    """Rows as :func:`tests.jobs.small_job.rows_text` makes them, with empty prompts where they are bad."""
    rows = [json.loads(line) for line in rows_text(num_rows).splitlines()]
    return {"custom_id": [row.get("custom_id") for row in rows], "note": [row.get("note") for row in rows],
            "prompt": ["" if i in bad else f"p{i}" for i in range(num_rows)], "when": pa.array(range(num_rows), pa.timestamp("ns")),
            "kind": pa.array([f"kind {i % 3}" for i in range(num_rows)]).dictionary_encode(),
            "sampling": [{"n": 2, "logprobs": 1} if i % 3 == 2 else None for i in range(num_rows)]}


@pytest.mark.parametrize("column", [column for column, _ in CASES], ids=lambda column: str(column.type))
def test_a_column_of_any_type_passes_through_as_it_is(tmp_path, column):
    column = pa.concat_arrays([column] * 12)
    prompts = ["" if i % 5 == 1 else f"p{i}" for i in range(len(column))]
    job = parquet_job(tmp_path, {"prompt": prompts, "x": column, "y": column})
    run_job(job, make_llm=FakeLLM)
    ours, given = read(job.output), pq.read_table(job.input)
    good = pa.array([i for i, prompt in enumerate(prompts) if prompt])
    assert ours.schema.names == ["prompt", "x", "y", *OWN]
    for name in ("prompt", "x", "y"):
        assert ours.schema.field(name).type == given.schema.field(name).type
        wanted = given[name].combine_chunks().take(good)
        assert ours[name].combine_chunks().equals(wanted) or _repr(ours[name]) == _repr(wanted)  # NaN is no equal
    assert len(all_errors(pathlib.Path(job.output))) == len(prompts) - len(good)


def _repr(column) -> str:
    return repr(column.cast(column.type.value_type).to_pylist() if pa.types.is_dictionary(column.type) else column.to_pylist())


def test_the_output_columns_have_the_values_of_a_jsonl_output(tmp_path):
    columns = rows_columns(11, bad=(4,))
    tables, lines = parquet_job(tmp_path, columns), parquet_job(tmp_path, columns, output="lines", output_format="jsonl")
    for job in (tables, lines):
        assert run_job(job, make_llm=FakeLLM).is_complete
    assert all_errors(pathlib.Path(tables.output)) == all_errors(pathlib.Path(lines.output)) != []
    for ours, theirs in zip(read(tables.output).drop_columns("when").to_pylist(), all_rows(pathlib.Path(lines.output)), strict=True):
        assert (ours["custom_id"], ours["note"], ours["usage"]) == (theirs["custom_id"], theirs["note"], theirs["usage"])
        assert ours["prompt_logprobs"] is None
        for completion, twin in zip(ours["outputs"], theirs["outputs"], strict=True):
            logprobs = completion.pop("logprobs")
            assert twin.pop("logprobs", None) == (logprobs and [
                {str(entry.pop("token_id")): entry for entry in token} for token in logprobs])
            assert completion == {"stop_reason": None, "cumulative_logprob": None, **twin}


def test_the_output_columns_have_their_types(tmp_path):
    job = parquet_job(tmp_path, {"usage": [1], "prompt": ["x"], "custom_id": pa.array(["a"]).dictionary_encode()})
    run_job(job, make_llm=FakeLLM)
    schema = read(job.output).schema
    assert schema.names == ["usage", "prompt", "custom_id", "outputs", "prompt_logprobs"]  # replaced where they were
    assert str(schema.field("custom_id").type) == "string"
    assert schema.field("usage").type == pa.struct([(f"{name}_tokens", pa.int64()) for name in ("prompt", "completion", "cached")])
    assert schema.field("outputs").type.value_type.names == ["index", "text", "token_ids", "finish_reason", "stop_reason", "cumulative_logprob",
                                                            "logprobs"]
    assert read(job.output)["custom_id"].to_pylist() == ["a"]


class Talkative(FakeLLM):
    """Gives stop reasons of both kinds, and log probabilities of the prompt."""

    def _output(self, number, prompt, params):
        output = super()._output(number, prompt, params)
        output.outputs[0].stop_reason = ["END", 7, None][number % 3]
        output.outputs[0].finish_reason = "stop"
        output.prompt_logprobs = [None, {5: Logprob(-0.25, 1, "a"), 6: Logprob(-math.inf, 2, "b")}]
        return output


def test_stop_reasons_are_text_and_prompt_log_probabilities_have_a_null_first(tmp_path):
    job = parquet_job(tmp_path, {"prompt": ["x", "y", "z"]})
    run_job(job, make_llm=Talkative)
    rows = read(job.output).to_pylist()
    assert sorted((row["outputs"][0]["stop_reason"] for row in rows), key=str) == ["7", "END", None]
    assert rows[0]["prompt_logprobs"] == [None, [{"token_id": 5, "logprob": -0.25, "rank": 1, "decoded_token": "a"},
                                                 {"token_id": 6, "logprob": None, "rank": 2, "decoded_token": "b"}]]


@pytest.mark.parametrize(("values", "kind", "wanted"), [
    ([True, None, False], pa.bool_(), [True, None, False]),
    ([1, -(2**63), None], pa.int64(), [1, -(2**63), None]),
    ([1, 2.5, None], pa.float64(), [1.0, 2.5, None]),
    ([2**53 + 1, 2.5], pa.string(), ["9007199254740993", "2.5"]),
    ([2**63, 1], pa.string(), ["9223372036854775808", "1"]),
    (["é", None], pa.string(), ["é", None]),
    (["a", 1], pa.string(), ['"a"', "1"]),
    ([True, 1], pa.string(), ["true", "1"]),
    ([[1, "é"], {"b": None}, None], pa.string(), ['[1, "é"]', '{"b": null}', None]),
    (["half \ud800", "whole"], pa.string(), ['"half \\ud800"', '"whole"']),
    ([None, None], pa.null(), [None, None]),
])
def test_a_key_of_jsonl_rows_becomes_a_column_of_one_type_in_all_parts(make_job, values, kind, wanted):
    text = "".join(json.dumps({"prompt": "x", "key": value}) + "\n" for value in values) + '{"prompt": "without the key"}\n'
    job = make_job(text, output_format="parquet", rows_per_part=1)
    run_job(job, make_llm=FakeLLM)
    table = read(job.output)
    assert table.schema.names == ["prompt", "key", *OWN]
    assert table.schema.field("key").type == kind
    assert table["key"].to_pylist() == [*wanted, None]


def test_rows_that_cannot_be_run_teach_no_types_where_they_are_no_objects(make_job):
    job = make_job('{"prompt": "x", "key": 1}\n{torn\n[1]\n{"prompt": "", "key": "text"}\n', output_format="parquet")
    run_job(job, make_llm=FakeLLM)
    assert read(job.output)["key"].to_pylist() == ["1"]
    assert len(all_errors(pathlib.Path(job.output))) == 3


def test_columns_that_a_table_cannot_have_are_refused_before_anything_is_run(make_job, monkeypatch):
    monkeypatch.setattr(column_types, "MAX_COLUMNS", 8)
    many = "".join(json.dumps({"prompt": "x", f"key {i}": 1}) + "\n" for i in range(8))
    with pytest.raises(JobError, match=r"row 7 \(.*line 8\): 'key 7' is the input's column number 9; .* at most 8: move keys"):
        run_job(make_job(many, output_format="parquet"), make_llm=None)
    with pytest.raises(JobError, match=r"row 0 .*: the key 'a\\ud800' holds half of a surrogate pair"):
        run_job(make_job('{"prompt": "x", "a\\ud800": 1}', output_format="parquet"), make_llm=None)
    assert run_job(make_job(many, output="lines"), make_llm=FakeLLM).is_complete


def test_the_types_are_in_the_manifest_and_a_job_that_changes_its_format_is_another(make_job):
    job = make_job(rows_text(7), output_format="parquet")
    run_job(job, make_llm=FakeLLM)
    manifest = json.loads((pathlib.Path(job.output) / "manifest.json").read_text())
    assert manifest["input"]["columns"] == {"prompt": "json", "note": "string", "custom_id": "string", "messages": "json", "sampling": "json"}
    assert manifest["job"]["output_format"] == "parquet"
    with pytest.raises(JobError, match=r"output_format was 'parquet' and is now 'jsonl'"):
        run_job(dataclasses.replace(job, output_format="auto"), make_llm=FakeLLM)


@pytest.mark.parametrize("columns", [{"prompt": pa.nulls(0, pa.string())}, None])
def test_an_input_without_rows_makes_one_part_that_has_the_columns(tmp_path, make_job, columns):
    job = parquet_job(tmp_path, columns) if columns else make_job("", output_format="parquet")
    assert run_job(job, make_llm=FakeLLM).is_complete
    part, = part_files(pathlib.Path(job.output)).values()
    assert num_rows_of(part.rows) == 0
    assert pq.read_schema(part.rows).names == [*(columns or ()), *OWN]


def test_a_part_all_of_whose_rows_fail_is_empty(tmp_path):
    job = parquet_job(tmp_path, {"prompt": ["", "", "", "x"]})
    result = run_job(job, make_llm=FakeLLM)
    assert (result.is_complete, result.num_errors) == (True, 3)
    assert [num_rows_of(files.rows) for files in part_files(pathlib.Path(job.output)).values()] == [0, 1]


def test_row_groups_do_not_depend_on_when_parts_are_committed(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_parts, "GROUP_ROWS", 4)
    monkeypatch.setattr(parquet, "KEPT_BYTES", 0)
    monkeypatch.setattr(parquet, "MAX_BATCH_ROWS", 3)
    columns = rows_columns(40, bad=(7, 8, 30))
    outputs = []
    for number, keys in enumerate(({"max_num_seqs": 1}, {"max_num_seqs": 30}, {"max_num_seqs": 7})):
        job = parquet_job(tmp_path, columns, output=f"out-{number}", rows_per_part=10, engine=keys)
        run_job(job, make_llm=FakeLLM)
        outputs.append(contents(pathlib.Path(job.output)))
        del outputs[-1]["manifest.json"]
    assert outputs[0] == outputs[1] == outputs[2]
    assert pq.ParquetFile(tmp_path / "out-0/part-00000.parquet").num_row_groups == 2


def both_kinds(tmp_path, make_job, output: str = "out", **keys):
    """The same small job from Parquet and from JSONL, both to Parquet."""
    return {"parquet": lambda output=output: parquet_job(tmp_path, rows_columns(11, bad=(1, 7)), output=output, **keys),
            "jsonl": lambda output=output: make_job(rows_text(11, bad=(1, 7)), output=output, output_format="parquet", **keys)}


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("seed", range(4))
def test_power_lost_again_and_again_also_while_resuming_ends_in_the_same_bytes(tmp_path, make_job, kind, seed):
    make, draw = both_kinds(tmp_path, make_job)[kind], random.Random(seed)
    whole, job = make("whole"), make()
    run_job(whole, make_llm=FakeLLM, disk=QuickDisk())
    for _ in range(8):
        disk = PowerLossDisk(draw.randrange(40), draw.choice(MOMENTS))
        try:
            run_job(job, make_llm=FakeLLM, disk=disk, sync_interval_s=0)
        except Death:
            disk.lose_power(pathlib.Path(job.output))
    assert run_job(job, make_llm=FakeLLM, disk=QuickDisk()).is_complete
    assert contents(pathlib.Path(job.output)) == contents(pathlib.Path(whole.output))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_loss_of_power_at_any_disk_call_is_resumed_byte_for_byte(tmp_path, make_job, kind, moment):
    make = both_kinds(tmp_path, make_job)[kind]
    whole = make("whole")
    run_job(whole, make_llm=FakeLLM, disk=QuickDisk())
    wanted = contents(pathlib.Path(whole.output))
    for number in itertools.count():
        job, disk = make(f"out-{number}"), PowerLossDisk(number, moment)
        try:
            run_job(job, make_llm=FakeLLM, disk=disk, sync_interval_s=0)
        except Death:
            disk.lose_power(pathlib.Path(job.output))
        assert run_job(job, make_llm=FakeLLM, disk=QuickDisk()).is_complete
        assert contents(pathlib.Path(job.output)) == wanted, number
        if not disk.has_struck:
            break
    assert number > {"before": 60, "half": 15, "after": 60}[moment]


@pytest.mark.slow
def test_a_process_that_exits_at_any_disk_call_is_resumed_byte_for_byte(tmp_path):
    job = parquet_job(tmp_path, rows_columns(11, bad=(1, 7)))
    command = [sys.executable, "-m", "tests.jobs.exit_at_every_call", job.input, job.output]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 130
    assert sorted(path.name for path in pathlib.Path(job.output).glob("part-*")) == [
        "part-00000.errors.jsonl", "part-00000.parquet", "part-00001.parquet", "part-00002.errors.jsonl", "part-00002.parquet",
        "part-00003.parquet"]


def test_a_job_that_is_killed_ends_as_if_it_had_not_been(tmp_path):
    columns, draw = rows_columns(60, bad=(9, 30, 31)), random.Random(20261121)
    engine = {"max_num_seqs": 4, "tick_s": 0.01}
    whole = parquet_job(tmp_path, columns, output="whole", rows_per_part=4, engine=engine)
    run_job(whole, make_llm=NoSleepLLM)
    job = parquet_job(tmp_path, columns, rows_per_part=4, engine=engine)
    folder = pathlib.Path(job.output)
    for num_parts in sorted(draw.sample(range(1, 14), 3)):
        process = start(job)
        wait_for(lambda: sum(path.suffix == ".parquet" for path in folder.iterdir()) >= num_parts, process)  # noqa: B023
        kill(process)
    assert run_job(job, make_llm=NoSleepLLM).num_new > 0
    assert contents(folder) == contents(pathlib.Path(whole.output))


BATCH_ROW = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "fake", "prompt": "x", "max_tokens": 2}}


def test_openai_batch_rows_are_answered_in_jsonl(tmp_path, make_job):
    job = parquet_job(tmp_path, {key: [value] for key, value in BATCH_ROW.items()})
    run_job(job, make_llm=FakeLLM)
    row, = all_rows(pathlib.Path(job.output))
    assert row["response"]["status_code"] == 200
    text = json.dumps(BATCH_ROW) + '\n{"prompt": "x"}'
    for refused in (make_job(text, output="a", output_format="parquet"), parquet_job(tmp_path, {}, output="b", output_format="parquet")):
        run_job(refused, make_llm=FakeLLM)
        error, = all_errors(pathlib.Path(refused.output))
        assert "OpenAI's own output row, which is JSON; set output_format: jsonl" in str(error)


@pytest.mark.parametrize("words", [["--output-format", "csv"], ["--output-format", "Parquet"], ["--output-format=3"]])
def test_another_format_is_refused(tmp_path, words):
    path = tmp_path / "job.yaml"
    path.write_text("model: demo\ninput: a.jsonl\noutput: out\n")
    with pytest.raises(JobError, match=r"output_format is .*; it must be auto, jsonl or parquet"):
        load_job(path, words)
    assert load_job(path, ["--output-format", "parquet"]).output_format == "parquet"


def test_the_part_files_of_a_folder_are_told_apart_whatever_their_format(tmp_path):
    for name in ("part-00001.parquet", "part-00000.jsonl", "part-00000.errors.jsonl", "part-00002.errors.jsonl", "part-00003.jsonl.tmp",
                 "part-100000.jsonl", "notes.parquet", "part-1.jsonl"):
        (tmp_path / name).write_text("{}\n" * 3)
    files = part_files(tmp_path)
    assert {part: (entry.rows.name, entry.errors and entry.errors.name) for part, entry in files.items()} == {
        0: ("part-00000.jsonl", "part-00000.errors.jsonl"), 1: ("part-00001.parquet", None), 100000: ("part-100000.jsonl", None)}
    assert num_rows_of(files[0].rows) == 3
    with pytest.raises(JobError, match=r"cannot read .*part-00001.parquet: Parquet magic bytes"):
        num_rows_of(files[1].rows)
    (tmp_path / "part-00001.jsonl").write_text("")
    with pytest.raises(JobError, match=r"part 1 is there twice"):
        part_files(tmp_path)
    os.remove(tmp_path / "part-00001.jsonl")
    (tmp_path / "part-00001.parquet").unlink()
    with pytest.raises(JobError, match=r"No such file"):
        num_rows_of(files[1].rows)


@pytest.mark.parametrize(("ids", "kind", "wanted"), [
    (pa.array([5, None, 7]), pa.int64(), [5, 1, 7]), (pa.array([5, 6, 7], pa.int32()), pa.int32(), [5, 6, 7]),
    (pa.array([5, 6, None], pa.int8()), pa.int64(), [5, 6, 2]), (pa.array([2**63, 6, 7], pa.uint64()), pa.uint64(), [2**63, 6, 7]),
    (pa.array([5.5, None, 7.0]), pa.float64(), [5.5, 1.0, 7.0]), (pa.array([5, 6, 5]).dictionary_encode().slice(0, 2), pa.int64(), [5, 6]),
    (pa.array(["5", None, "x"]), pa.string(), ["5", "1", "x"]),
])
def test_custom_ids_that_are_numbers_keep_their_values_and_their_type(tmp_path, ids, kind, wanted):
    columns = {"custom_id": ids, "prompt": ["a", "b", "c"][:len(ids)]}
    run_job(parquet_job(tmp_path, columns), make_llm=FakeLLM)
    found = read(tmp_path / "out")["custom_id"]
    assert (found.type, found.to_pylist()) == (kind, wanted)
    run_job(parquet_job(tmp_path, columns, output="lines", output_format="jsonl"), make_llm=FakeLLM)
    assert [row["custom_id"] for row in all_rows(tmp_path / "lines")] == [
        str(place) if given is None else given for place, given in enumerate(ids.to_pylist())]


@pytest.mark.parametrize(("ids", "kind", "wanted"), [
    ([5, 7], pa.int64(), [5, 7, 2]), ([5, 7.5], pa.float64(), [5.0, 7.5, 2.0]), ([5, "x"], pa.string(), ["5", "x", "2"]),
    (["a", "x"], pa.string(), ["a", "x", "2"])])
def test_custom_ids_of_a_jsonl_input_make_a_column_of_the_type_that_holds_them(make_job, ids, kind, wanted):
    text = "".join(json.dumps({"custom_id": custom_id, "prompt": "a"}) + "\n" for custom_id in ids) + '{"prompt": "b"}\n'
    job = make_job(text, output_format="parquet")
    run_job(job, make_llm=FakeLLM)
    found = read(job.output)["custom_id"]
    assert (found.type, found.to_pylist()) == (kind, wanted)
