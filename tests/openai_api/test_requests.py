"""Bodies of requests: what they ask of the engine, and what is refused."""
import dataclasses
import re

import pytest
from openai.types.chat import completion_create_params as chat_params
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming

from tpllm.engine.sampling_params import SamplingParams
from tpllm.openai_api import ApiError, read_request
from tpllm.openai_api.requests import WITHOUT_EFFECT, known_keys

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "hello"}]
VALUES = {
    "n": 3, "temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "presence_penalty": 1.5, "frequency_penalty": -1.5,
    "repetition_penalty": 1.25, "logit_bias": {"5": -100, "6": 1.5}, "allowed_token_ids": [1, 2], "bad_words": ["no"], "seed": 11, "stop": ["x", "y"],
    "include_stop_str_in_output": True, "stop_token_ids": [9], "ignore_eos": True, "max_tokens": 40, "min_tokens": 2, "prompt_logprobs": 1,
    "skip_special_tokens": False, "detokenize": False, "truncate_prompt_tokens": 5,
}


def completion(**body):
    return read_request(TEXT, {"model": "m", "prompt": "p", **body})


def chat(**body):
    return read_request(CHAT, {"model": "m", "messages": USER, **body})


def test_every_sampling_parameter_has_a_value_here():
    assert set(VALUES) == {field.name for field in dataclasses.fields(SamplingParams)} - {"logprobs", "output_kind"}


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize("name", VALUES)
def test_a_sampling_parameter_reaches_the_engine_under_its_name(make, name):
    expected = getattr(SamplingParams(**{name: VALUES[name]}), name)
    assert getattr(make(**{name: VALUES[name]}).params, name) == expected != getattr(make().params, name)


def test_only_the_default_length_of_a_completion_differs_from_the_engines():
    assert completion().params == SamplingParams(max_tokens=16)
    assert chat().params == SamplingParams()


def test_a_body_goes_before_the_callers_defaults_and_those_before_openais():
    defaults = {"temperature": 0.5, "max_tokens": 99, "logprobs": 2, "seed": 4}
    params = read_request(TEXT, {"prompt": "p", "temperature": 0, "seed": 8}, defaults=defaults).params
    assert params == SamplingParams(temperature=0, max_tokens=99, logprobs=2, seed=8)
    request = read_request(CHAT, {"messages": USER, "max_tokens": 3, "logprobs": False}, defaults=defaults)
    assert request.params == SamplingParams(temperature=0.5, max_tokens=3, seed=4)
    assert request.num_top_logprobs is None


@pytest.mark.parametrize("make", [completion, chat])
def test_null_counts_as_not_given(make):
    keys = set(known_keys(TEXT if make is completion else CHAT)) - {"model", "prompt", "messages"}
    assert make(**dict.fromkeys(keys)) == make()


@pytest.mark.parametrize("make", [completion, chat])
def test_what_concerns_only_openais_service_changes_nothing(make):
    values = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "flex", "parallel_tool_calls": False,
              "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h",
              "prompt_cache_options": {"mode": "implicit"}, "priority": 3, "request_id": "r",
              "cache_salt": "s", "stream_options": {"include_usage": True}, "prediction": {"type": "content", "content": "x"}}
    assert set(values) == set(WITHOUT_EFFECT)
    assert make(**values) == make()


@pytest.mark.parametrize(("endpoint", "types"), [
    (TEXT, CompletionCreateParamsNonStreaming), (CHAT, chat_params.CompletionCreateParamsNonStreaming)])
def test_every_key_of_the_openai_package_is_known(endpoint, types):
    assert types.__required_keys__ | types.__optional_keys__ <= set(known_keys(endpoint))


@pytest.mark.parametrize(("prompt", "expected"), [
    ("text", ("text",)), ([1, 2], ({"prompt_token_ids": [1, 2]},)), (["a", "b"], ("a", "b")),
    ([[1], [2, 3]], ({"prompt_token_ids": [1]}, {"prompt_token_ids": [2, 3]})), ("", ("",)),
])
def test_a_prompt_has_four_forms(prompt, expected):
    assert completion(prompt=prompt).prompts == expected


def test_messages_become_a_chat_prompt_with_the_templates_variables():
    assert chat().prompts == ({"messages": USER},)
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    prompt, = chat(messages=parts, chat_template_kwargs={"enable_thinking": False}, add_generation_prompt=False, tools=tools).prompts
    assert prompt == {"messages": parts, "template_kwargs": {"enable_thinking": False}, "add_generation_prompt": False, "tools": tools}
    assert chat(tools=tools, tool_choice="none").prompts == chat().prompts


@pytest.mark.parametrize(("kwargs", "effort"), [({}, "low"), ({"reasoning_effort": "high"}, "high"), ({"enable_thinking": True}, "low")])
def test_the_effort_of_reasoning_is_a_variable_of_the_template_which_its_own_variables_go_before(kwargs, effort):
    prompt, = chat(reasoning_effort="low", chat_template_kwargs=kwargs).prompts
    assert prompt["template_kwargs"] == {**kwargs, "reasoning_effort": effort}


def test_arguments_of_earlier_tool_calls_become_objects():
    def call(arguments):
        return [*USER, {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}]},
                {"role": "tool", "tool_call_id": "c", "content": "3"}]
    assert chat(messages=call('{"a": 1}')).prompts[0]["messages"] == call({"a": 1})
    assert chat(messages=call("")).prompts[0]["messages"] == call({})
    with pytest.raises(ApiError, match=r"messages\[1\]\['tool_calls'\]\[0\].* is \"\{a\"; it must be JSON"):
        chat(messages=call("{a"))


FUNCTION = {"name": "f", "arguments": "{}"}


@pytest.mark.parametrize(("calls", "message"), [
    ([None], r"messages\[1\]\['tool_calls'\]\[0\] is None; give an object"), ("x", r"\['tool_calls'\] is 'x'; give a list of objects"),
    ({"id": "c"}, "give a list of objects"), ([{"type": "function", "function": FUNCTION}, 5], r"\[1\] is 5; give an object"),
    ([{}], r'\[0\] is \{.*; it must be \{"type": "function"'), ([{"function": None}], "it must be"),
    ([{"function": {"arguments": "{}"}}], "it must be"),
    ([{"function": {"name": 5, "arguments": "{}"}}], "it must be"), ([{"function": {"name": "", "arguments": "{}"}}], "it must be"),
    ([{"function": {"name": "f", "arguments": 5}}], r"\['arguments'\] is 5; it must be JSON text, or an object"),
    ([{"type": "custom", "custom": {}}], 'type "custom"; only functions'),
])
def test_a_tool_call_that_is_none_is_refused_by_its_place_and_value(calls, message):
    with pytest.raises(ApiError, match=message) as caught:
        chat(messages=[*USER, {"role": "assistant", "tool_calls": calls}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize("call", [{"function": FUNCTION}, {"type": None, "function": FUNCTION}, {"function": {"name": "f"}},
                                  {"function": {"name": "f", "arguments": None}}])
def test_what_histories_leave_out_of_a_tool_call_is_not_asked_for(call):
    said = chat(messages=[*USER, {"role": "assistant", "tool_calls": [call]}]).prompts[0]["messages"][1]["tool_calls"][0]
    assert said["function"]["name"] == "f"
    assert (said.keys(), said["function"].keys()) == (call.keys(), call["function"].keys())


@pytest.mark.parametrize("function", [None, 5, {}, {"name": None}, {"name": ""}])
def test_a_tool_without_a_named_function_is_refused(function):
    with pytest.raises(ApiError, match=r"tools\[1\] is .*; it must be") as caught:
        chat(tools=[{"type": "function", "function": {"name": "f"}}, {"type": "function", "function": function}])
    assert caught.value.param == "tools"


def test_log_probabilities_are_asked_for_as_each_endpoint_does():
    assert (completion(logprobs=3).params.logprobs, completion(logprobs=0).params.logprobs) == (3, 0)
    bodies = ({"logprobs": True}, {"logprobs": True, "top_logprobs": 4}, {"logprobs": False})
    assert [chat(**body).params.logprobs for body in bodies] == [0, 4, None]


def test_an_echo_scores_the_prompt_only_where_log_probabilities_are_asked_for():
    assert completion(echo=True).params.prompt_logprobs is None
    request = completion(echo=True, logprobs=2)
    assert (request.is_echo, request.params.prompt_logprobs, request.shows_prompt_logprobs) == (True, 2, False)
    assert completion(echo=True, logprobs=2, prompt_logprobs=1).shows_prompt_logprobs
    request = completion(echo=True, max_tokens=0)
    assert (request.is_prompt_only, request.params.max_tokens) == (True, 1)


def test_both_names_of_the_length_of_a_chat_are_taken():
    assert chat(max_completion_tokens=5).params.max_tokens == chat(max_tokens=5, max_completion_tokens=5).params.max_tokens == 5


def test_what_would_be_done_anyway_may_be_asked_for():
    assert chat(stream=False, response_format={"type": "text"}, modalities=["text"], verbosity="medium") == chat()
    assert completion(stream=False, suffix="", best_of=2, n=2) == completion(n=2)


@pytest.mark.parametrize(("endpoint", "body", "param", "code", "message"), [
    ("/v1/embeddings", {"input": "a"}, "url", "unsupported_value", r'"/v1/embeddings"; it must be /v1/completions or /v1/chat/completions'),
    ("/v1/responses", {"input": "a"}, "url", "unsupported_value", "endpoint"),
    (None, {}, "url", "unsupported_value", "endpoint is null"),
    (TEXT, [1], "body", "invalid_type", r"body is \[1\]; it must be an object"),
    (TEXT, {}, "prompt", "missing_required_parameter", "prompt is missing"),
    (CHAT, {}, "messages", "missing_required_parameter", "messages is missing"),
    (TEXT, {"prompt": "a", "temprature": 1}, "temprature", "unknown_parameter", "unknown key 'temprature'; did you mean 'temperature'"),
    (CHAT, {"messages": USER, "best_of": 1}, "best_of", "unknown_parameter", "unknown key 'best_of'"),
    (TEXT, {"prompt": "a", "max_completion_tokens": 1}, "max_completion_tokens", "unknown_parameter", "it belongs to /v1/chat/completions"),
    (TEXT, {"prompt": "a", "model": 5}, "model", "invalid_type", "model is 5; it must be text"),
    (TEXT, {"prompt": []}, "prompt", "invalid_type", r"prompt is \[\]"),
    (TEXT, {"prompt": [1, "a"]}, "prompt", "invalid_type", "it must be text, a list of token ids"),
    (TEXT, {"prompt": [[1], []]}, "prompt", "invalid_type", "prompt is"),
    (TEXT, {"prompt": [True]}, "prompt", "invalid_type", "prompt is"),
    (TEXT, {"prompt": {"a": 1}}, "prompt", "invalid_type", "prompt is"),
    (TEXT, {"prompt": "a", "stream": True}, "stream", "unsupported_value", "stream is true, which is not supported yet; leave it out, or use false"),
    (CHAT, {"messages": USER, "stream": True}, "stream", "unsupported_value", "stream is true"),
    (CHAT, {"messages": USER, "stream": 0}, "stream", "unsupported_value", "stream is 0"),
    (CHAT, {"messages": USER, "response_format": {"type": "json_object"}}, "response_format", "unsupported_value", "not supported yet"),
    (CHAT, {"messages": USER, "reasoning_effort": 3}, "reasoning_effort", "invalid_type", "reasoning_effort is 3; it must be text"),
    (TEXT, {"prompt": "a", "reasoning_effort": "low"}, "reasoning_effort", "unknown_parameter", "it belongs to /v1/chat/completions"),
    (CHAT, {"messages": USER, "verbosity": "low"}, "verbosity", "unsupported_value", "verbosity is \"low\", which is not supported yet"),
    (CHAT, {"messages": USER, "guided_json": {}}, "guided_json", "unknown_parameter", "unknown key 'guided_json'"),
    (CHAT, {"messages": USER, "tool_choice": "required"}, "tool_choice", "unsupported_value", 'only "auto" and "none" are supported'),
    (CHAT, {"messages": USER, "tool_choice": {"type": "function"}}, "tool_choice", "unsupported_value", "tool_choice is"),
    (CHAT, {"messages": USER, "tools": [{"type": "custom"}]}, "tools", "unsupported_value", r"tools\[0\] is of the type"),
    (CHAT, {"messages": USER, "tools": {}}, "tools", "invalid_type", "it must be a list of objects"),
    (CHAT, {"messages": []}, "messages", "invalid_value", "messages is empty"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages", "invalid_value",
     r"messages\[0\]\['content'\]\[0\] is of the type 'image_url'"),
    (CHAT, {"messages": USER, "chat_template_kwargs": 1}, "chat_template_kwargs", "invalid_type", "must be an object"),
    (CHAT, {"messages": USER, "add_generation_prompt": 1}, "add_generation_prompt", "invalid_type", "must be true or false"),
    (CHAT, {"messages": USER, "logprobs": 3}, "logprobs", "invalid_type", "in a chat it must be true or false"),
    (CHAT, {"messages": USER, "top_logprobs": 3}, "top_logprobs", "invalid_value", "without logprobs"),
    (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value", "top_logprobs is 21; .*from 0 to 20"),
    (TEXT, {"prompt": "a", "logprobs": True}, "logprobs", "invalid_value", "logprobs is True; it must be a whole number"),
    (CHAT, {"messages": USER, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "invalid_value", "they mean the same"),
    (TEXT, {"prompt": "a", "max_tokens": 0}, "max_tokens", "invalid_value", "max_tokens is 0; it must be a whole number from 1"),
    (TEXT, {"prompt": "a", "temperature": 0.5, "top_p": 3}, "top_p", "invalid_value", "top_p is 3"),
    (TEXT, {"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias", "invalid_value", "logit_bias of token 5 is 101"),
    (TEXT, {"prompt": "a", "min_tokens": 20}, None, "invalid_value", "min_tokens 20 is above max_tokens 16"),
    (TEXT, {"prompt": "a", "suffix": "b"}, "suffix", "unsupported_value", 'suffix is "b", which is not supported yet'),
    (TEXT, {"prompt": "a", "best_of": 3}, "best_of", "unsupported_value", "best_of is 3 and n is 1"),
    (TEXT, {"prompt": "a", "best_of": "3"}, "best_of", "invalid_type", "must be a whole number"),
    (TEXT, {"prompt": "a", "echo": 1}, "echo", "invalid_type", "echo is 1; it must be true or false"),
])
def test_what_cannot_be_served_is_refused_with_the_key_and_the_fix(endpoint, body, param, code, message):
    with pytest.raises(ApiError, match=message) as caught:
        read_request(endpoint, body)
    error = caught.value.body()["error"]
    assert (error["param"], error["code"], error["type"], caught.value.status) == (param, code, "invalid_request_error", 400)
    assert re.search(message, error["message"])
