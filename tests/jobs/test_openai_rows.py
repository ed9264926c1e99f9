"""OpenAI batch rows: the file of a script made with the openai package's types runs, and its output reads with the same types."""
import dataclasses
import hashlib
import pathlib

import pytest

from tests.jobs.fake_llm import FakeLLM
from tests.jobs.openai_batch import CHAT, COMPLETIONS, USER, batch_row, batch_rows, to_jsonl
from tests.jobs.small_job import all_errors, all_rows, contents
from tests.support.openai_types import parsed
from tests.tokenizer import tokenizer_folders as folders
from tpllm.engine.outputs import failed_output
from tpllm.engine.prompts import encode_prompt
from tpllm.errors import TpllmError
from tpllm.jobs.config import JobConfig
from tpllm.jobs.outputs.durable import Disk
from tpllm.jobs.rows import row_seed
from tpllm.jobs.runner import run_job
from tpllm.tokenizer import Tokenizer

ROW = batch_row("a", COMPLETIONS, {"prompt": "x", "max_tokens": 2})


class SeenLLM(FakeLLM):
    """Notes what reaches the engine."""

    def generate_iter(self, requests, *, on_error):
        type(self).seen = list(requests)
        return super().generate_iter(type(self).seen, on_error=on_error)


def test_a_batch_file_of_the_openai_package_runs_and_its_output_reads_with_its_types(run_text):
    rows = batch_rows()
    finished = all_rows(run_text(to_jsonl(rows)))
    assert [row["custom_id"] for row in finished] == [row["custom_id"] for row in rows]
    for row, given in zip(finished, rows, strict=True):
        assert set(row) == {"id", "custom_id", "response", "error"}
        assert set(row["response"]) == {"status_code", "request_id", "body"}
        assert (row["response"]["status_code"], row["error"]) == (200, None)
        body = parsed(row["response"]["body"])
        prompt = given["body"].get("prompt")
        num_prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
        num_choices = num_prompts * given["body"].get("n", 1)
        assert [choice.index for choice in body.choices] == list(range(num_choices))
        assert all((choice.logprobs is None) == ("logprobs" not in given["body"]) for choice in body.choices)
        assert body.usage.total_tokens == body.usage.prompt_tokens + body.usage.completion_tokens
        assert (body.model, body.created) == ("fake", 0)
    ids = [name for row in finished for name in (row["id"], row["response"]["request_id"], row["response"]["body"]["id"])]
    assert len(set(ids)) == 3 * len(rows)


def test_ids_are_the_documented_formula_and_no_clock_is_in_the_output(make_job):
    digest = hashlib.blake2b(b"openai:3:1", digest_size=12).hexdigest()
    job = make_job(to_jsonl([ROW, batch_row("b", CHAT, {"messages": USER, "max_tokens": 1})]), seed=3)
    run_job(job, make_llm=FakeLLM)
    again = dataclasses.replace(job, output=job.output + "-again")
    run_job(again, make_llm=FakeLLM)
    _, row = all_rows_of(job)
    assert (row["id"], row["response"]["request_id"], row["response"]["body"]["id"]) == (f"batch_req_{digest}", f"req_{digest}", f"chatcmpl-{digest}")
    assert all_rows_of(job) == all_rows_of(again)


def all_rows_of(job: JobConfig) -> list[dict]:
    return all_rows(pathlib.Path(job.output))


def test_each_prompt_of_a_list_has_a_seed_of_its_own_unless_the_body_gives_one(make_job):
    bodies = {"b": {"prompt": ["x", "x"]}, "c": {"prompt": ["x", "y"], "seed": 7}}
    text = to_jsonl([ROW, *(batch_row(name, COMPLETIONS, body) for name, body in bodies.items())])
    run_job(make_job(text, seed=3), make_llm=SeenLLM)
    place_1 = int.from_bytes(hashlib.blake2b(b"3:1:1", digest_size=8).digest(), "little")
    assert [params.seed for _, params in SeenLLM.seen] == [row_seed(3, 0), row_seed(3, 1), place_1, 7, 7]


def test_the_jobs_sampling_and_then_the_models_come_after_the_bodys(make_job):
    other = batch_row("b", COMPLETIONS, {"prompt": "y", "temperature": 1, "top_k": 4})
    run_job(make_job(to_jsonl([ROW, other]), sampling={"top_k": 3}), make_llm=SeenLLM)
    assert [(params.temperature, params.top_k, params.max_tokens) for _, params in SeenLLM.seen] == [(0.5, 3, 2), (1, 4, 16)]


def test_plain_rows_and_batch_rows_may_be_in_one_file(run_text):
    plain = {"prompt": "p", "url": "https://example.org", "body": "of a letter", "method": "post"}
    chat = {"prompt": None, **batch_row("c", CHAT, {"messages": USER})}
    finished = all_rows(run_text(to_jsonl([plain, {**ROW, "tag": [1], "error": "mine"}, chat])))
    assert {**plain, "custom_id": "0"}.items() <= finished[0].items()
    assert list(finished[1]) == ["id", "custom_id", "response", "error", "tag"]
    assert (finished[1]["tag"], finished[1]["error"]) == ([1], None)
    assert finished[2]["response"]["body"]["object"] == "chat.completion"


@pytest.mark.parametrize(("row", "param", "code", "message"), [
    ({**ROW, "custom_id": None}, "custom_id", "missing_required_parameter", "custom_id is missing"),
    ({**ROW, "custom_id": True}, "custom_id", "missing_required_parameter", "custom_id"),
    ({**ROW, "method": "GET"}, "method", "unsupported_value", 'method is "GET"; it must be "POST"'),
    ({**ROW, "method": None}, "method", "missing_required_parameter", "method is missing"),
    ({**ROW, "url": "/v1/embeddings"}, "url", "unsupported_value", '"/v1/embeddings"; it must be /v1/completions or /v1/chat/completions'),
    ({**ROW, "url": 3}, "url", "unsupported_value", "the endpoint is 3"),
    ({**ROW, "body": None}, "body", "missing_required_parameter", "body is missing"),
    ({**ROW, "body": [1]}, "body", "invalid_type", "it must be an object"),
    ({**ROW, "prompt": "p"}, None, None, "the row has prompt beside the body; put it into the body"),
    ({**ROW, "sampling": {"n": 2}}, None, None, "the row has sampling beside the body"),
    ({**ROW, "body": {"prompt": "x", "stream": True}}, "stream", "unsupported_value", "stream is true"),
    ({**ROW, "body": {"prompt": "x", "temprature": 0}}, "temprature", "unknown_parameter", "did you mean 'temperature'"),
    ({**ROW, "body": {"prompt": ["x", ""]}}, None, None, "prompt[1]: the prompt is empty"),
    ({**ROW, "body": {"prompt": "\ud800", "stop": "\ud800"}}, None, None, None),
])
def test_a_batch_row_that_fails_gets_openais_error_and_the_rest_go_on(make_job, row, param, code, message):
    class Refusing(FakeLLM):
        def _output(self, number, prompt, params):
            if prompt in ("", "\ud800"):
                return failed_output(str(number), prompt, "the prompt is empty; give at least one token" if not prompt else "surrogate")
            return super()._output(number, prompt, params)
    job = make_job(to_jsonl([batch_row("first", *list(ROW.values())[2:]), row, batch_row("last", *list(ROW.values())[2:])]))
    assert run_job(job, make_llm=Refusing).num_errors == 1
    assert [row["custom_id"] for row in all_rows_of(job)] == ["first", "last"]
    error, = all_errors(pathlib.Path(job.output))
    assert list(error)[:4] == ["id", "custom_id", "response", "error"]
    assert error["custom_id"] == (row["custom_id"] if isinstance(row["custom_id"], str) else "1")
    assert (error["error"], error["row"], error["line"], error["input"]) == (None, 1, 2, row)
    assert (error["response"]["status_code"], error["response"]["request_id"].removeprefix("req_")) == (400, error["id"].removeprefix("batch_req_"))
    found = error["response"]["body"]["error"]
    assert (found["type"], found["param"], found["code"]) == ("invalid_request_error", param, code)
    assert message is None or message in found["message"]


def test_a_failure_inside_the_engine_is_a_servers_error(make_job):
    job = make_job(to_jsonl([batch_row("a", COMPLETIONS, {"prompt": "FAIL"})]))
    run_job(job, make_llm=FakeLLM)
    error, = all_errors(pathlib.Path(job.output))
    assert (error["response"]["status_code"], error["response"]["body"]["error"]["type"]) == (500, "server_error")


class DyingDisk(Disk):
    """Stops the job at its second part."""

    def replace(self, source, target):
        if target.name == "part-00001.jsonl":
            raise RuntimeError("stopped here")
        super().replace(source, target)


def test_a_resumed_job_of_batch_rows_equals_an_uninterrupted_one(make_job):
    rows = [dict(row, custom_id=f"{turn}-{row['custom_id']}") for turn in range(3) for row in batch_rows()]
    rows[4]["body"] = {"prompt": "x", "stream": True}
    whole = make_job(to_jsonl(rows))
    run_job(whole, make_llm=FakeLLM)
    resumed = dataclasses.replace(whole, output=whole.output + "-resumed")
    with pytest.raises(RuntimeError, match="stopped here"):
        run_job(resumed, make_llm=FakeLLM, disk=DyingDisk())
    assert 0 < run_job(resumed, make_llm=FakeLLM).num_new < len(rows)
    assert contents(pathlib.Path(resumed.output)) == contents(pathlib.Path(whole.output))


def test_the_shards_of_a_job_of_batch_rows_hold_the_bytes_of_the_whole(make_job):
    rows = [dict(row, custom_id=f"{turn}-{row['custom_id']}") for turn in range(2) for row in batch_rows()]
    whole = make_job(to_jsonl(rows))
    run_job(whole, make_llm=FakeLLM)
    shards = [dataclasses.replace(whole, output=whole.output + "-shards", shard=f"{index}/2") for index in range(2)]
    for shard in shards:
        run_job(shard, make_llm=FakeLLM)
    parts = [{name: data for name, data in contents(pathlib.Path(job.folder)).items() if name.startswith("part-")} for job in (whole, *shards)]
    assert len(parts[0]) == 4
    assert parts[0] == {**parts[1], **parts[2]}


def test_a_row_of_several_prompts_is_written_once_all_of_them_are_there(make_job):
    class Stopping(FakeLLM):
        def generate_iter(self, requests, *, on_error):
            outputs = super().generate_iter(requests, on_error=on_error)
            yield next(outputs)
    job = make_job(to_jsonl([batch_row("a", COMPLETIONS, {"prompt": ["x", "y"], "max_tokens": 1})]))
    with pytest.raises(Exception, match="1 rows unfinished"):
        run_job(job, make_llm=Stopping)
    result = run_job(job, make_llm=FakeLLM)
    assert (result.num_new, result.is_complete) == (1, True)


class TemplateLLM(FakeLLM):
    """Renders chats with a real tokenizer, as the facade does."""

    tokenizer: Tokenizer

    def _output(self, number, prompt, params):
        try:
            encode_prompt(prompt, self.tokenizer)
        except TpllmError as error:
            return failed_output(str(number), None, str(error))
        return super()._output(number, prompt, params)


@pytest.mark.parametrize(("template", "message"), [
    ("{% if messages[0].role != 'user' %}{{ raise_exception('no ' ~ messages[0].role ~ ' role') }}{% endif %}ok", "no system role"),
    ("{% if messages[0].role != 'user' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}ok",
     "runs for over 1 s"),
    ("{% if messages[0].role != 'user' %}{{ 'ab' * 4000000 }}{% endif %}ok", "over 4 MB"),
])
def test_what_a_template_refuses_is_reported_with_its_row(make_job, tmp_path, template, message):
    TemplateLLM.tokenizer = Tokenizer.from_folder(folders.write_folder(tmp_path / "model", folders.chatml_like(),
                                                                       tokenizer_config={"chat_template": template}))
    refused = [{"role": "system", "content": "x"}]
    job = make_job(to_jsonl([{"messages": USER}, {"messages": refused}, batch_row("b", CHAT, {"messages": refused}),
                             batch_row("c", CHAT, {"messages": USER, "max_tokens": 1})]))
    assert run_job(job, make_llm=TemplateLLM).num_errors == 2
    plain, batch = all_errors(pathlib.Path(job.output))
    assert (plain["row"], plain["line"], plain["custom_id"]) == (1, 2, "1")
    assert message in plain["error"]
    assert (batch["row"], batch["line"], batch["custom_id"], batch["response"]["status_code"]) == (2, 3, "b", 400)
    assert message in batch["response"]["body"]["error"]["message"]
    assert len(all_rows_of(job)) == 2


@pytest.mark.slow
def test_the_demo_model_answers_a_batch_file(tmp_path):
    path = tmp_path / "batch.jsonl"
    echo = batch_row("echo", COMPLETIONS, {"prompt": "import os\n", "max_tokens": 2, "echo": True, "logprobs": 1})
    path.write_text(to_jsonl([*batch_rows(), echo]))
    job = JobConfig(model="demo", input=str(path), output=str(tmp_path / "out"), mesh="tp=1", rows_per_part=4,
                    engine={"max_num_seqs": 4, "max_model_len": 64})
    assert run_job(job).num_errors == 0
    rows = {row["custom_id"]: row for row in all_rows(tmp_path / "out")}
    for name in list(rows)[:-1]:
        assert parsed(rows[name]["response"]["body"]).system_fingerprint.startswith("fp_")
    first, second = (rows["text-1"]["response"]["body"]["choices"][place]["text"] for place in (0, 4))
    assert first != second  # the same prompt twice, with seeds of its own
    scored = parsed(rows["text-2"]["response"]["body"]).choices[0]
    assert "".join(scored.logprobs.tokens) == scored.text
    assert all(len(top) in (2, 3) for top in scored.logprobs.top_logprobs)
    content = parsed(rows["chat-1"]["response"]["body"]).choices[0]
    assert b"".join(bytes(token.bytes) for token in content.logprobs.content).decode() == content.message.content
    choice = rows["echo"]["response"]["body"]["choices"][0]
    assert choice["text"].startswith("import os\n")
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"][1:])
    assert len(choice["logprobs"]["tokens"]) == rows["echo"]["response"]["body"]["usage"]["total_tokens"]


def test_a_number_as_custom_id_becomes_text_in_openais_form_where_it_is_always_text(make_job):
    rows = [{**ROW, "custom_id": custom_id} for custom_id in (7, 2.5, 8.0)] + [{**ROW, "custom_id": 9, "body": {"prompt": "x", "stream": True}}]
    job = make_job(to_jsonl(rows))
    run_job(job, make_llm=FakeLLM)
    assert [row["custom_id"] for row in all_rows_of(job)] == ["7", "2.5", "8"]
    assert [row["custom_id"] for row in all_errors(pathlib.Path(job.output))] == ["9"]


@pytest.mark.parametrize("body", [
    {"response_format": {"type": "text", "json_schema": None}}, {"response_format": {"type": "text"}}, {"max_tokens": 3.0}, {"top_k": 50.0},
    {"max_completion_tokens": 3.0}, {"logprobs": True, "top_logprobs": 2.0}, {"seed": 5.0}, {"n": 1.0}, {"stop_token_ids": [4.0]},
    {"messages": [*USER, {"role": "assistant", "content": None, "refusal": "I cannot."}, *USER]},
    {"messages": [*USER, {"role": "assistant", "content": None}, *USER]},
    {"messages": [*USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]}, *USER]},
    {"messages": [*USER, {"role": "assistant", "content": "Yes.", "refusal": None, "tool_calls": None, "function_call": None, "audio": None}, *USER]},
])
def test_what_openais_own_clients_write_is_taken(make_job, body):
    job = make_job(to_jsonl([batch_row("a", CHAT, {"messages": USER, **body})]))
    run_job(job, make_llm=FakeLLM)
    assert all_errors(pathlib.Path(job.output)) == []
    assert len(all_rows_of(job)) == 1
