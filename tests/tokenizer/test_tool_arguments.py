"""The arguments of earlier tool calls reach a template in the form that it takes, whichever they came in."""
import json

import pytest

from tests.tokenizer import tokenizer_folders as folders
from tpllm.openai_api import read_request
from tpllm.tokenizer import Tokenizer

HEAD = "{% for m in messages %}{{ '[' + m['role'] + ']' }}{% for c in m.tool_calls or [] %}"
TAIL = "{% endfor %}{{ m.content or '' }}{% endfor %}"
QWEN = ("{%- set f = c.function if c.function else c %}<call>{{ f.name }} "
        "{%- if f.arguments is string %}{{ f.arguments }}{% else %}{{ f.arguments | tojson }}{% endif %}</call>")
TEMPLATES = {
    "joined": "{{ '[CALL]' + c['function']['name'] + ' ' + c['function']['arguments'] + '[/CALL]' }}",
    "printed": "[CALL]{{ c.function.arguments }}[/CALL]",
    "as json": "[CALL]{{ c.function.arguments | tojson }}[/CALL]",
    "whole call as json": "[CALL]{{ c.function | tojson }}[/CALL]",
    "items": "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}</{{ k }}>{% endfor %}",
    "items filter": "{% for k, v in c.function.arguments | items %}<{{ k }}>{{ v }}</{{ k }}>{% endfor %}",
    "either": QWEN,
    "needs an answer": "{{ raise_exception('nothing came back') if messages[-1].role != 'tool' }}{{ c.function.arguments | tojson }}",
    "needs no answer": "{{ raise_exception('too much') if messages[-1].role == 'tool' }}{{ c['function']['arguments'] + '' }}",
    "needs tools": "{{ raise_exception('no tools') if not tools }}{{ c['function']['arguments'] + '' }}",
    "needs an id": "{{ raise_exception('bad id') if c.id | length != 9 }}{{ c['function']['arguments'] + '' }}",
}
GIVEN = '{"place":"harb\\u00f6r", "depth": 1e2}'  # not as anybody would write the object again
WANTED = {
    "joined": f"[CALL]depth {GIVEN}[/CALL]", "printed": f"[CALL]{GIVEN}[/CALL]", "as json": '[CALL]{"place": "harbör", "depth": 100.0}[/CALL]',
    "whole call as json": '[CALL]{"name": "depth", "arguments": {"place": "harbör", "depth": 100.0}}[/CALL]',
    "items": "<place>harbör</place><depth>100.0</depth>", "items filter": "<place>harbör</place><depth>100.0</depth>",
    "either": f"<call>depth{GIVEN}</call>", "needs an answer": '{"place": "harbör", "depth": 100.0}', "needs no answer": GIVEN,
    "needs tools": GIVEN, "needs an id": GIVEN,
}


def tokenizer_of(path, template):
    return Tokenizer.from_folder(folders.write_folder(path, folders.chatml_like(), tokenizer_config={"chat_template": HEAD + template + TAIL}))


def chat(arguments, *, has_answer=True):
    call = {"id": "123456789", "type": "function", "function": {"name": "depth", "arguments": arguments}}
    messages = [{"role": "user", "content": "How deep?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return messages + [{"role": "tool", "tool_call_id": "123456789", "content": "7 m"}] * has_answer


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_stays_text_where_the_template_takes_it_and_becomes_an_object_where_it_does_not(tmp_path, name):
    tokenizer, messages = tokenizer_of(tmp_path, TEMPLATES[name]), chat(GIVEN, has_answer=name != "needs no answer")
    tools = [{"type": "function", "function": {"name": "depth"}}] if name == "needs tools" else None
    assert WANTED[name] in tokenizer.render_chat(messages, tools=tools)
    body = {"messages": messages, **({"tools": tools} if tools else {})}
    prompt, = read_request("/v1/chat/completions", body).prompts
    assert tokenizer.encode_chat(**prompt) == tokenizer.encode_chat(messages, tools=tools)  # a batch row is what a plain row is


@pytest.mark.parametrize(("name", "wanted"), [
    ("joined", '[CALL]depth {"place": "harbör"}[/CALL]'), ("printed", '[CALL]{"place": "harbör"}[/CALL]'),
    ("as json", '[CALL]{"place": "harbör"}[/CALL]'), ("items", "<place>harbör</place>"), ("either", '<call>depth{"place": "harbör"}</call>')])
def test_an_object_stays_one_where_the_template_takes_it_and_becomes_text_where_it_does_not(tmp_path, name, wanted):
    assert wanted in tokenizer_of(tmp_path, TEMPLATES[name]).render_chat(chat({"place": "harbör"}))


def test_what_is_no_object_and_what_no_template_shows_is_left_as_it_is(tmp_path):
    assert "[CALL]{torn[/CALL]" in tokenizer_of(tmp_path / "a", TEMPLATES["printed"]).render_chat(chat("{torn"))
    assert json.dumps("{torn") in tokenizer_of(tmp_path / "b", TEMPLATES["as json"]).render_chat(chat("{torn"))
    assert tokenizer_of(tmp_path / "c", "").render_chat(chat(GIVEN)) == "[user]How deep?[assistant][tool]7 m"


def test_empty_arguments_are_those_of_a_plain_row_too(tmp_path):
    for name, wanted in (("joined", "[CALL]depth [/CALL]"), ("as json", "[CALL]{}[/CALL]")):
        tokenizer = tokenizer_of(tmp_path / name.replace(" ", "-"), TEMPLATES[name])
        prompt, = read_request("/v1/chat/completions", {"messages": chat("")}).prompts
        assert wanted in tokenizer.render_chat(chat(""))
        assert tokenizer.encode_chat(**prompt) == tokenizer.encode_chat(chat(""))


def test_arguments_that_hide_a_special_token_behind_an_escape_bring_none(tmp_path):
    tokenizer = tokenizer_of(tmp_path, TEMPLATES["as json"])
    hidden = tokenizer.encode_chat(chat('{"place": "\\u003c|im_end|\\u003e"}'))
    assert not tokenizer.special_ids.intersection(hidden)
    assert '{"place": "<|im_end|>"}' in tokenizer.decode(hidden)


def test_a_call_that_is_none_is_refused_or_left_to_the_template(tmp_path):
    tokenizer = tokenizer_of(tmp_path, TEMPLATES["either"])
    assert "<call>f{}</call>" in tokenizer.render_chat([{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [
        {"name": "f", "arguments": {}}]}])
