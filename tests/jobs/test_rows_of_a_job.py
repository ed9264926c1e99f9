"""What becomes of each row: its output, or its line of the errors file."""
import hashlib
import json
import re

import pytest

from tests.jobs.fake_llm import FakeLLM
from tests.jobs.small_job import all_errors, all_rows, contents, rows_text
from tpllm.engine.sampling_params import SamplingParams
from tpllm.errors import JobError
from tpllm.jobs.rows import row_seed
from tpllm.jobs.runner import run_job

GOOD = '{"prompt": "good"}'

BAD_LINES = [
    ("{torn", r"not JSON: Expecting property name"),
    ('"text"', r"the row is \"text\"; it must be an object"),
    ("[1]", r"must be an object"),
    ("{}", r"no keys and no prompt"),
    ('{"text": "a"}', r"the row has 'text' and no prompt"),
    ('{"prompt": 5}', r"prompt is 5; it must be text or a list of token ids"),
    ('{"prompt": [1, "a"]}', r"must be text or a list of token ids"),
    ('{"prompt": [true]}', r"must be text or a list of token ids"),
    ('{"prompt_token_ids": "a"}', r"prompt_token_ids is \"a\"; it must be a list of token ids"),
    ('{"prompt": "a", "messages": []}', r"prompt and messages; give exactly one"),
    ('{"messages": []}', r"messages is \[\]; it must be a list"),
    ('{"messages": [{"content": "a"}]}', r"messages is"),
    ('{"messages": [{"role": "user", "content": "a"}], "template_kwargs": 1}', r"template_kwargs is 1; it must be an object"),
    ('{"custom_id": true, "prompt": "a"}', r"custom_id is true; it must be text or a number"),
    ('{"custom_id": [5], "prompt": "a"}', r"custom_id is \[5\]; it must be text or a number"),
    ('{"prompt": "a", "sampling": 1}', r"sampling is 1; it must be an object"),
    ('{"prompt": "a", "sampling": {"temprature": 1}}', r"unknown key 'sampling.temprature'; did you mean 'sampling.temperature'"),
    ('{"prompt": "a", "sampling": {"temperature": -1}}', r"sampling: temperature is -1; it must be a finite number"),
    ('{"prompt": "a", "sampling": {"n": 1000}}', r"sampling: n is 1000; it must be a whole number from 1 to 128"),
    ('{"prompt": "a", "x": NaN}', r"NaN is no JSON number"),
    ('{"prompt": "a", "x": 1e999}', r"beyond the range"),
    ('{"prompt": "a\\ud800"}', r"half of a surrogate pair"),
    ("[" * 100_000, r"nested too deeply"),
    ('{"messages": [{"role": "user", "content": "a", "x": ' + "[" * 200 + "]" * 200 + '}]}', r"nested too deeply: over 100 lists and objects"),
    ('{"prompt": ""}', r"the prompt is empty"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_row_becomes_an_error_line_and_the_rest_go_on(run_text, line, message):
    folder = run_text(f"{GOOD}\n{line}\n{GOOD}\n")
    assert [row["custom_id"] for row in all_rows(folder)] == ["0", "2"]
    error, = all_errors(folder)
    assert (error["row"], error["line"]) == (1, 2)
    assert re.search(message, error["error"])


def test_bytes_that_are_not_utf8_are_an_error_line(run_text):
    folder = run_text(GOOD.encode() + b'\n{"prompt": "\xff"}\n')
    assert "not UTF-8: invalid start byte at byte 12" in all_errors(folder)[0]["error"]


def test_an_error_line_keeps_the_row_where_it_could_be_parsed(run_text, tmp_path):
    folder = run_text('{"custom_id": "mine", "prompt": 5, "note": "é"}\n{torn\n')
    parsed, torn = all_errors(folder)
    file = str(tmp_path / "rows.jsonl")
    assert parsed == {"custom_id": "mine", "row": 0, "file": file, "line": 1, "error": parsed["error"],
                      "input": {"custom_id": "mine", "prompt": 5, "note": "é"}}
    assert torn == {"custom_id": "1", "row": 1, "file": file, "line": 2, "error": torn["error"]}


def test_an_errors_file_is_there_only_where_a_row_failed(run_text):
    folder = run_text(rows_text(9, bad=(4,)))
    assert sorted(contents(folder)) == ["manifest.json", "part-00000.jsonl", "part-00001.errors.jsonl", "part-00001.jsonl", "part-00002.jsonl"]


def test_an_output_row_keeps_every_key_and_adds_id_outputs_and_usage(run_text):
    given = {"z": [1, {"deep": None}], "prompt": "p", "é": 1.5, "usage": "replaced"}
    row, = all_rows(run_text(json.dumps(given)))
    output, = row["outputs"]
    assert row == {**given, "custom_id": "0", "outputs": [output],
                   "usage": {"prompt_tokens": 3, "completion_tokens": len(output["token_ids"]), "cached_tokens": 0}}
    assert output == {"index": 0, "text": f" é{output['token_ids']}", "token_ids": output["token_ids"], "finish_reason": "length"}


def test_log_probabilities_are_there_when_asked_for_and_never_break_the_json(run_text):
    row, = all_rows(run_text('{"prompt": "p", "sampling": {"logprobs": 1, "n": 2, "max_tokens": 2}}'))
    first, second = row["outputs"]
    assert [first["index"], second["index"]] == [0, 1]
    assert first["cumulative_logprob"] == -0.5
    token, other = first["token_ids"]
    assert first["logprobs"] == [{str(token): {"logprob": -0.5, "rank": 1, "decoded_token": f"<{token}>"}},
                                 {str(other): {"logprob": None, "rank": 1, "decoded_token": f"<{other}>"}}]


def test_half_a_surrogate_pair_outside_the_prompt_is_kept(run_text):
    row, = all_rows(run_text('{"prompt": "p", "note": "a\\ud800"}'))
    assert row["note"] == "a\ud800"


def test_a_row_of_many_lists_side_by_side_is_not_nested_too_deeply(run_text):
    row, = all_rows(run_text(json.dumps({"prompt": "p", "many": [[[i]] for i in range(300)]})))
    assert len(row["many"]) == 300


def test_blank_lines_are_not_rows_and_a_byte_order_mark_is_skipped(run_text):
    folder = run_text(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\n  \n{torn\n" + GOOD.encode())
    assert [row["custom_id"] for row in all_rows(folder)] == ["0", "2"]
    assert [(error["row"], error["line"]) for error in all_errors(folder)] == [(1, 4)]


def test_parts_hold_their_slices_in_input_order(run_text):
    folder = run_text(rows_text(8))
    ids = [[json.loads(line)["custom_id"] for line in (folder / f"part-0000{part}.jsonl").read_bytes().splitlines()] for part in range(3)]
    assert ids == [["0", "id-1", "2"], ["3", "id-4", "5"], ["6", "id-7"]]


@pytest.mark.parametrize(("num_rows", "rows_per_part", "num_parts"), [(0, 3, 1), (1, 3, 1), (5, 1, 5), (5, 1000, 1), (6, 3, 2)])
def test_any_number_of_rows_makes_its_parts(run_text, num_rows, rows_per_part, num_parts):
    folder = run_text(rows_text(num_rows), rows_per_part=rows_per_part)
    assert len(list(folder.glob("part-?????.jsonl"))) == num_parts
    assert len(all_rows(folder)) == num_rows


def test_a_custom_id_that_is_a_number_keeps_its_value_in_outputs_and_errors(run_text):
    ids = [70, -3, 2.5, 1e300, 12345678901234567890, 0]
    folder = run_text("".join(json.dumps({"custom_id": custom_id, "prompt": "a"}) + "\n" for custom_id in ids) + '{"custom_id": 8, "prompt": 5}\n'
                      '{"prompt": "x"}\n')
    found = [row["custom_id"] for row in all_rows(folder)]
    assert found == [*ids, "7"]
    assert [type(custom_id) for custom_id in found] == [int, int, float, float, int, int, str]
    assert [error["custom_id"] for error in all_errors(folder)] == [8]


def test_whole_floats_in_a_row_are_whole_numbers(make_job):
    run_job(make_job('{"prompt": [1.0, 2], "sampling": {"max_tokens": 3.0, "top_k": 50.0, "seed": 7.0, "stop_token_ids": [9.0]}}\n'
                     '{"prompt_token_ids": [4.0]}\n', sampling={"n": 2.0}), make_llm=Recorder)
    assert [json.loads(prompt) for prompt in Recorder.params] == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [4]}]
    params, second = Recorder.params.values()
    assert (params.max_tokens, params.top_k, params.seed, params.stop_token_ids, params.n, second.n) == (3, 50, 7, (9,), 2, 2)
    assert {type(value) for value in (params.max_tokens, params.top_k, params.seed, params.n, *params.stop_token_ids)} == {int}


@pytest.mark.parametrize("line", ['{"prompt": [1.5]}', *(f'{{"prompt": "a", "sampling": {sampling}}}'
                                                         for sampling in ('{"max_tokens": 3.5}', '{"top_k": "5"}', '{"n": true}'))])
def test_what_is_no_whole_number_is_still_refused(run_text, line):
    assert "must be" in all_errors(run_text(line))[0]["error"]


@pytest.mark.parametrize(("rows", "first", "second"), [
    (['{"custom_id": "a", "prompt": "x"}', GOOD, '{"custom_id": "a", "prompt": "y"}'], 0, 2),
    ([GOOD, GOOD, '{"custom_id": "1", "prompt": "y"}'], 1, 2),
    (['{"custom_id": 7, "prompt": "x"}', '{"custom_id": "7", "prompt": "y"}'], 0, 1),
    (['{"custom_id": 7, "prompt": "x"}', '{"custom_id": 7.0, "prompt": "y"}'], 0, 1),
    ([GOOD, GOOD, '{"custom_id": 1, "prompt": "y"}'], 1, 2),
    (['{"custom_id": "é", "prompt": "x"}', '{"custom\\u005fid": "\\u00e9", "prompt": "y"}'], 0, 1),
])
def test_two_rows_of_one_custom_id_are_refused_before_anything_is_generated(make_job, rows, first, second):
    class NoLLM(FakeLLM):
        def __init__(self, *_, **__):
            raise AssertionError
    places = rf"row {first} \(.*rows.jsonl line {first + 1}\) and on row {second} \(.*rows.jsonl line {second + 1}\)"
    with pytest.raises(JobError, match=rf"custom_id .* is on {places}"):
        run_job(make_job("\n".join(rows)), make_llm=NoLLM)


def test_a_chance_collision_of_digests_refuses_nothing(run_text, monkeypatch):
    monkeypatch.setattr("tpllm.jobs.sources.row_source._digest", lambda text: 7)
    assert len(all_rows(run_text(rows_text(9)))) == 9


class Recorder(FakeLLM):
    params: dict[str, SamplingParams]

    def generate_iter(self, requests, *, on_error):
        pairs = list(requests)
        type(self).params = {json.dumps(prompt): params for prompt, params in pairs}
        return super().generate_iter(pairs, on_error=on_error)


def test_a_rows_seed_follows_from_the_jobs_and_its_place_unless_one_is_given(make_job):
    text = '{"prompt": "a"}\n{"prompt": "b", "sampling": {"seed": 5}}\n{"prompt": "c"}\n'
    run_job(make_job(text, seed=3), make_llm=Recorder)
    assert [params.seed for params in Recorder.params.values()] == [row_seed(3, 0), 5, row_seed(3, 2)]
    run_job(make_job(text, output="other", sampling={"seed": 9}), make_llm=Recorder)
    assert [params.seed for params in Recorder.params.values()] == [9, 5, 9]


def test_a_row_seed_is_the_documented_formula():
    assert row_seed(3, 12) == int.from_bytes(hashlib.blake2b(b"3:12", digest_size=8).digest(), "little")


def test_a_rows_sampling_goes_before_the_jobs_and_that_before_the_models(make_job):
    text = '{"prompt": "a"}\n{"prompt": "b", "sampling": {"temperature": 2, "top_k": 4}}\n'
    run_job(make_job(text, sampling={"top_k": 3}), make_llm=Recorder)
    assert [(params.temperature, params.top_k) for params in Recorder.params.values()] == [(0.5, 3), (2, 4)]
    run_job(make_job(text, output="other", sampling={"temperature": 1}), make_llm=Recorder)
    assert [(params.temperature, params.top_k) for params in Recorder.params.values()] == [(1, 0), (2, 4)]


def test_the_prompt_reaches_the_engine_in_the_form_it_takes(make_job):
    run_job(make_job('{"prompt": "a"}\n{"prompt": [1, 2]}\n{"prompt_token_ids": [3]}\n'
                     '{"messages": [{"role": "user", "content": "b"}], "template_kwargs": {"x": 1}}\n'), make_llm=Recorder)
    assert [json.loads(prompt) for prompt in Recorder.params] == [
        "a", {"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]},
        {"messages": [{"role": "user", "content": "b"}], "template_kwargs": {"x": 1}}]


def test_an_input_that_changes_while_the_job_runs_is_noticed(make_job):
    job = make_job(rows_text(20))

    class Meddler(FakeLLM):
        def generate_iter(self, *arguments, **options):
            with open(job.input, "a") as rows:
                rows.write(GOOD + "\n")
            return super().generate_iter(*arguments, **options)
    with pytest.raises(JobError, match=r"the input .* changed while the job ran"):
        run_job(job, make_llm=Meddler)
