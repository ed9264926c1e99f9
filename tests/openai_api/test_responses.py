"""Bodies of responses: they read with the openai package's types, and say what the engine said."""
import math

import pytest

from tests.support.openai_types import parsed
from tpllm.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, failed_output
from tpllm.openai_api import ApiError, ResponseHead, read_request, response_body
from tpllm.openai_api.logprobs import text_offsets

USER = [{"role": "user", "content": "hello"}]
HEAD = ResponseHead("abc", 0, "demo", "fp_1")
TEXTS = {1: "<s>", 2: " Once", 3: " a", 4: "\ufffd", 5: "\ufffd", 6: "é", 7: "</s>", 8: "time"}


class Texts:
    """The tokenizer of these ids."""

    def decode(self, ids, *, skip_special_tokens):
        return "".join(TEXTS[token] for token in ids if not (skip_special_tokens and token in (1, 7)))

    def token_text(self, token):
        return TEXTS[token]


def score(token, logprob=-0.5, **others):
    """The drawn token and others, by the names ``t3=-1.0``."""
    values = {token: logprob, **{int(name[1:]): value for name, value in others.items()}}
    ranks = sorted(values, key=lambda token: -values[token])
    return {token: Logprob(value, ranks.index(token) + 1, TEXTS[token]) for token, value in values.items()}


def output(*completions, prompt="Once", prompt_ids=(1, 2), prompt_logprobs=None, num_cached=0):
    return RequestOutput("0", prompt, list(prompt_ids), list(completions), RequestMetrics(0.0), prompt_logprobs, True, num_cached)


def body_of(endpoint, body, *outputs):
    request = read_request(endpoint, {"prompt": "Once", **body} if endpoint == "/v1/completions" else {"messages": USER, **body})
    return response_body(request, outputs, HEAD, get_tokenizer=Texts)


def completion(body, *outputs):
    return body_of("/v1/completions", body, *outputs)


def chat(body, *outputs):
    return body_of("/v1/chat/completions", body, *outputs)


def test_a_completion_holds_every_key_of_openais():
    second, first = CompletionOutput(1, " b", [3, 7], finish_reason="stop"), CompletionOutput(0, " a", [3], finish_reason="length")
    body = completion({"n": 2}, output(second, first, num_cached=1))
    assert body == {
        "id": "cmpl-abc", "object": "text_completion", "created": 0, "model": "demo", "system_fingerprint": "fp_1",
        "choices": [{"index": 0, "text": " a", "finish_reason": "length", "logprobs": None},
                    {"index": 1, "text": " b", "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 1}}}
    assert parsed(body).choices[1].text == " b"


def test_a_chat_completion_holds_every_key_of_openais():
    body = chat({}, output(CompletionOutput(0, " a", [3, 7], finish_reason="stop"), prompt=None))
    assert body == {
        "id": "chatcmpl-abc", "object": "chat.completion", "created": 0, "model": "demo", "system_fingerprint": "fp_1",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": " a", "refusal": None}, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4, "prompt_tokens_details": {"cached_tokens": 0}}}
    assert parsed(body).choices[0].message.content == " a"


def test_choices_are_numbered_through_the_prompts():
    outputs = [output(CompletionOutput(0, f"{name}0", [3], finish_reason="stop"), CompletionOutput(1, f"{name}1", [3, 3], finish_reason="stop"))
               for name in "ab"]
    body = parsed(completion({"prompt": ["x", "y"], "n": 2}, *outputs))
    assert [(choice.index, choice.text) for choice in body.choices] == [(0, "a0"), (1, "a1"), (2, "b0"), (3, "b1")]
    assert (body.usage.prompt_tokens, body.usage.completion_tokens) == (4, 6)


def test_log_probabilities_of_a_completion_are_lists_over_tokens():
    logprobs = [score(3, -2.0, t2=-0.5, t6=-1.0), score(6, -0.25, t3=-math.inf)]
    body = completion({"logprobs": 2}, output(CompletionOutput(0, " aé", [3, 6], logprobs=logprobs, finish_reason="length")))
    assert body["choices"][0]["logprobs"] == {
        "tokens": [" a", "é"], "token_logprobs": [-2.0, -0.25], "text_offset": [0, 2],
        "top_logprobs": [{" Once": -0.5, "é": -1.0, " a": -2.0}, {"é": -0.25, " a": -9999.0}]}
    assert parsed(body).choices[0].logprobs.tokens == [" a", "é"]


def test_no_likeliest_tokens_are_shown_where_none_were_asked_for():
    logprobs = [score(3)]
    text = completion({"logprobs": 0}, output(CompletionOutput(0, " a", [3], logprobs=logprobs, finish_reason="length")))
    assert text["choices"][0]["logprobs"]["top_logprobs"] is None
    talk = chat({"logprobs": True}, output(CompletionOutput(0, " a", [3], logprobs=logprobs, finish_reason="length")))
    assert talk["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert parsed(text).object != parsed(talk).object


def test_log_probabilities_of_a_chat_are_objects_with_bytes():
    logprobs = [score(6, -2.0, t2=-0.5, t3=-1.0), score(4, -0.25)]
    body = chat({"logprobs": True, "top_logprobs": 2}, output(CompletionOutput(0, "é\ufffd", [6, 4], logprobs=logprobs, finish_reason="length")))
    assert body["choices"][0]["logprobs"] == {"refusal": None, "content": [
        {"token": "é", "logprob": -2.0, "bytes": [195, 169], "top_logprobs": [
            {"token": " Once", "logprob": -0.5, "bytes": list(b" Once")}, {"token": " a", "logprob": -1.0, "bytes": list(b" a")}]},
        {"token": "\ufffd", "logprob": -0.25, "bytes": None, "top_logprobs": [{"token": "\ufffd", "logprob": -0.25, "bytes": None}]}]}
    assert parsed(body).choices[0].logprobs.content[0].bytes == [195, 169]


@pytest.mark.parametrize(("given", "prompt_text"), [("Once", "Once"), (None, " Once")])
def test_an_echo_begins_with_the_prompt_and_its_scores(given, prompt_text):
    answer = output(CompletionOutput(0, " a", [3], logprobs=[score(3, -1.0)], finish_reason="length"), prompt=given,
                    prompt_logprobs=[None, score(2, -3.0, t3=-0.5)])
    choice = completion({"echo": True, "logprobs": 1}, answer)["choices"][0]
    assert choice == {"index": 0, "text": prompt_text + " a", "finish_reason": "length", "logprobs": {
        "tokens": ["<s>", " Once", " a"], "token_logprobs": [None, -3.0, -1.0], "text_offset": [0, 0, len(prompt_text)],
        "top_logprobs": [None, {" a": -0.5, " Once": -3.0}, {" a": -1.0}]}}


def test_an_echo_of_no_new_tokens_shows_only_the_prompt():
    answer = output(CompletionOutput(0, " a", [3], logprobs=[score(3)], finish_reason="length"), prompt_logprobs=[None, score(2)])
    body = completion({"echo": True, "max_tokens": 0, "logprobs": 0}, answer)
    choice, = body["choices"]
    assert (choice["text"], choice["logprobs"]["tokens"], body["usage"]["completion_tokens"]) == ("Once", ["<s>", " Once"], 0)


def test_prompt_log_probabilities_stand_where_vllm_puts_them():
    answer = output(CompletionOutput(0, " a", [3], finish_reason="length"), prompt_logprobs=[None, score(2, -math.inf)])
    expected = [None, {"2": {"logprob": -9999.0, "rank": 1, "decoded_token": " Once"}}]
    assert completion({"prompt_logprobs": 1}, answer)["choices"][0]["prompt_logprobs"] == expected
    assert chat({"prompt_logprobs": 1}, answer)["prompt_logprobs"] == expected


@pytest.mark.parametrize(("text", "texts", "offsets"), [
    ("Once a", ["<s>", " Once", " a"], [0, 0, 4]),  # a special token is not in the text, and the first space is cut
    ("a€b€", ["a", "\ufffd", "\ufffd", "\ufffd", "b", "\ufffd"], [0, 1, 1, 1, 2, 3]),  # parts of a character
    (" a a", [" a", " a"], [0, 2]),
    ("on", ["on", " a", " STOP"], [0, 2, 2]),  # cut off by a stop string
    ("ab", ["a", "", "b"], [0, 1, 1]),
])
def test_a_tokens_offset_is_where_it_stands_in_the_text(text, texts, offsets):
    assert list(text_offsets(text, texts)) == offsets


def test_what_the_engine_refused_and_what_failed_in_it_are_told_apart():
    with pytest.raises(ApiError, match=r"^the prompt is empty") as refused:
        completion({}, failed_output("0", "", "the prompt is empty; give at least one token"))
    assert (refused.value.status, refused.value.body()["error"]["type"]) == (400, "invalid_request_error")
    outputs = output(CompletionOutput(0, finish_reason="stop")), output(CompletionOutput(0, finish_reason="error", error="not finite"))
    with pytest.raises(ApiError, match=r"^prompt\[1\]: not finite") as failed:
        completion({"prompt": ["a", "b"]}, *outputs)
    assert (failed.value.status, failed.value.body()["error"]["type"]) == (500, "server_error")
