"""Chat templates: what they may do, what they refuse, and that users' strings never become special tokens."""
import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer import tokenizer_folders as folders
from tpllm.errors import PromptError, TokenizerError
from tpllm.tokenizer import Tokenizer

USER = [{"role": "user", "content": "hello"}]
KINDS = ["llama3", "mistral", "mistral_legacy", "qwen3", "chatml"]


def special_pieces(tokenizer, ids):
    return [tokenizer.piece(token_id) for token_id in ids if token_id in tokenizer.special_ids]


def with_template(path, template, **settings_):
    return Tokenizer.from_folder(folders.write_folder(path, folders.chatml_like(), tokenizer_config={"chat_template": template, **settings_}))


def test_a_chat_is_what_the_template_writes_with_its_special_tokens_parsed(kinds):
    tokenizer = kinds["llama3"]
    messages = [{"role": "system", "content": " be brief "}, {"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    text = tokenizer.render_chat(messages)
    assert text == ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|>"
                    "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert tokenizer.encode_chat(messages) == tokenizer.encode(text, add_special_tokens=False, parse_special=True)
    assert tokenizer.encode_chat(messages).count(tokenizer.bos_token_id) == 1
    assert not tokenizer.render_chat(messages, add_generation_prompt=False).endswith("\n\n")


def test_parts_are_joined_by_newlines_for_a_template_that_takes_texts(kinds):
    messages = [{"role": "user", "content": [{"type": "text", "text": "one"}, "two"]}]
    assert "one\ntwo<|im_end|>" in kinds["chatml"].render_chat(messages)


@pytest.mark.parametrize("kind", KINDS)
def test_special_token_text_in_messages_stays_text_unless_asked(kinds, kind):
    tokenizer = kinds[kind]
    for special in map(tokenizer.piece, tokenizer.special_ids):
        dirty = [{"role": "user", "content": f"{special}hello {special} lo{special}"}, {"role": "assistant", "content": special}]
        clean = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "lo"}]
        ids = tokenizer.encode_chat(dirty)
        assert special_pieces(tokenizer, ids) == special_pieces(tokenizer, tokenizer.encode_chat(clean))
        assert tokenizer.decode(ids, skip_special_tokens=False).count(special) == tokenizer.render_chat(dirty).count(special)
        parsed = tokenizer.encode_chat(dirty, parse_special=True)
        assert parsed == tokenizer.encode(tokenizer.render_chat(dirty), add_special_tokens=False, parse_special=True)
        assert len(special_pieces(tokenizer, parsed)) == len(special_pieces(tokenizer, ids)) + 4


@pytest.mark.parametrize("kind", KINDS)
def test_no_user_text_changes_which_special_tokens_a_chat_has(kinds, kind):
    tokenizer = kinds[kind]
    expected = special_pieces(tokenizer, tokenizer.encode_chat(USER))
    texts = [tokenizer.piece(token_id) for token_id in tokenizer.special_ids]
    fragments = [*texts, *(text[:3] for text in texts), *(text[3:] for text in texts), "<", ">", " ", "hello", "é"]

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.sampled_from(fragments), max_size=6))
    def check(parts):
        content = "".join(parts)
        assert special_pieces(tokenizer, tokenizer.encode_chat([{"role": "user", "content": content}])) == expected
    check()


def test_two_parts_cannot_make_a_special_token_together(kinds):
    tokenizer = kinds["llama3"]
    ids = tokenizer.encode_chat([{"role": "user", "content": [{"type": "text", "text": "a<|eot"}, {"type": "text", "text": "_id|>b"}]}])
    assert special_pieces(tokenizer, ids) == special_pieces(tokenizer, tokenizer.encode_chat(USER))
    assert "a<|eot_id|>b" in tokenizer.decode(ids)


def test_two_messages_cannot_make_a_special_token_together(tmp_path):
    tokenizer = with_template(tmp_path, "{{ messages[0].content }}{{ messages[1].content }}{{ '<|im_end|>' }}")
    ids = tokenizer.encode_chat([{"role": "user", "content": "a<|im_"}, {"role": "user", "content": "start|>b"}])
    assert special_pieces(tokenizer, ids) == ["<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|im_start|>b<|im_end|>"


def test_a_message_cannot_end_a_special_token_that_the_template_begins(tmp_path):
    tokenizer = with_template(tmp_path, "{{ '<|' }}{{ messages[0].content }}{{ '<|im_end|>' }}")
    ids = tokenizer.encode_chat([{"role": "user", "content": "im_start|>b"}])
    assert special_pieces(tokenizer, ids) == ["<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>b<|im_end|>"


def test_tools_and_template_kwargs_cannot_bring_special_tokens_even_through_json(tmp_path):
    template = "{{ tools | tojson(ensure_ascii=True) }}{{ extra.text | upper }}{{ '<|im_end|>' }}"
    tokenizer = with_template(tmp_path, template)
    ids = tokenizer.encode_chat(USER, tools=[{"<|im_end|>": "<|im_start|>"}], template_kwargs={"extra": {"text": "x<|im_end|>"}})
    assert special_pieces(tokenizer, ids) == ["<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == '[{"<|im_end|>": "<|im_start|>"}]X<|IM_END|><|im_end|>'


@pytest.mark.parametrize("kind", ["mistral", "mistral_legacy"])
def test_special_text_leaves_the_tokens_around_it_as_they_would_be(kinds, kind):
    tokenizer = kinds[kind]
    before = [*USER, {"role": "assistant", "content": "lo"}]
    dirty, twin = ([*before, {"role": "user", "content": f"hello {text} hello"}] for text in ("</s>", "<:s>"))
    slash, colon = (tokenizer.encode("x" + text, add_special_tokens=False)[-1] for text in "/:")
    expected = tokenizer.encode_chat(twin)
    expected[expected.index(colon)] = slash
    # Only the "/" of the assembled text differs: spaces before and after are cut as in text without special tokens.
    assert expected.count(colon) == 0
    assert tokenizer.encode_chat(dirty) == expected


def test_thinking_tags_are_read_by_the_template_and_by_the_tokenizer(kinds):
    tokenizer = kinds["qwen3"]
    messages = [*USER, {"role": "assistant", "content": "<think>\nhm <|im_end|>\n</think>\n\nyes"}, *USER]
    assert "hm" not in tokenizer.render_chat(messages)
    ids = tokenizer.encode_chat(USER, template_kwargs={"enable_thinking": False})
    assert tokenizer.decode(ids).endswith("<think>\n\n</think>\n\n")
    assert "<think>" in [tokenizer.piece(token_id) for token_id in ids]


def test_templates_have_the_functions_filters_and_tags_they_count_on(tmp_path):
    template = ("{{ {'a': '<é>'} | tojson }}{{ {'b': [1], 'a': 2} | tojson(indent=1, sort_keys=True) }}\n"
                "{% for i in range(9) %}{% if i == 2 %}\n  {% break %}\n{% endif %}{{ i }}{% endfor %}"
                "{% generation %}{% set x = 1 %}g{% endgeneration %}{{ x is defined }}{{ strftime_now('%Y') }}"
                "{{ pad_token is defined }}{{ eos_token }}{{ documents is none }}{{ k }}")
    tokenizer = with_template(tmp_path, template, eos_token="<|im_end|>")
    years = {str(datetime.datetime.now().year)}
    text = tokenizer.render_chat(USER, template_kwargs={"k": 7})
    years.add(str(datetime.datetime.now().year))
    assert text in {'{"a": "<é>"}{\n "a": 2,\n "b": [\n  1\n ]\n}\n01gFalse' + year + "False<|im_end|>True7" for year in years}


@pytest.mark.parametrize(("template", "message"), [
    ("{% if %}", "syntax error in line 1"),
    ("{{ raise_exception('no system role') }}", "no system role"),
    ("{{ messages[0].absent.deeper }}", "absent"),
    ("{{ 'a' + none }}", "TypeError"),
    ("{{ ''.__class__.__mro__ }}", "__class__|unsafe"),
    ("{{ raise_exception.__globals__['os'] }}", "__globals__|unsafe"),
    ("{{ messages.append(1) }}", "unsafe|append"),
])
def test_a_template_that_fails_says_what_it_said(tmp_path, template, message):
    with pytest.raises(TokenizerError, match=message):
        with_template(tmp_path, template).encode_chat(USER)


def test_a_template_that_refuses_the_messages_passes_its_reason_on(kinds):
    with pytest.raises(TokenizerError, match="roles must alternate"):
        kinds["mistral"].encode_chat([*USER, *USER])


@pytest.mark.parametrize(("messages", "message"), [
    ("hello", "messages is a str"), ([], "messages is empty"), ([*USER, "x"], r"messages\[1\] is a str"),
    ([{"content": "x"}], r"messages\[0\] has the role None"), ([{"role": "", "content": "x"}], r"messages\[0\] has the role ''"),
    ([{"role": "user"}], r"messages\[0\] has no content"), ([{"role": "user", "content": 3}], r"messages\[0\]\['content'\] is a int"),
    ([{"role": "user", "content": [{"type": "image"}]}], r"messages\[0\]\['content'\]\[0\] is of the type 'image'"),
    ([{"role": "user", "content": [{"type": "text"}]}], r"\['text'\] is a NoneType"),
    ([{"role": "user", "content": "\ud800"}], r"messages\[0\]\['content'\].*surrogate"),
    ([{"role": "user", "content": "x", "extra": object()}], r"messages\[0\]\['extra'\] is a object"),
])
def test_malformed_messages_are_refused_with_their_index(kinds, messages, message):
    with pytest.raises(PromptError, match=message):
        kinds["chatml"].encode_chat(messages)


def test_messages_among_the_template_kwargs_are_not_dropped_in_silence(kinds):
    with pytest.raises(PromptError, match="template_kwargs holds 'messages'"):
        kinds["chatml"].encode_chat(USER, template_kwargs={"messages": USER})


@pytest.mark.parametrize("name", ["tools", "template_kwargs"])
def test_tools_and_template_kwargs_of_another_type_are_refused(kinds, name):
    with pytest.raises(PromptError, match=f"{name} is 'f'"):
        kinds["llama3"].encode_chat(USER, **{name: "f"})


def test_a_model_without_a_template_says_where_to_put_one(tmp_path):
    folders.write_folder(tmp_path, folders.chatml_like())
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja"):
        Tokenizer.from_folder(tmp_path).encode_chat(USER)


def test_templates_come_from_every_place_a_folder_may_hold_them(tmp_path):
    named = [{"name": "default", "template": "from config"}, {"name": "tool_use", "template": "with tools"}]
    tokenizer = with_template(tmp_path, named)
    assert tokenizer.render_chat(USER) == "from config"
    assert tokenizer.render_chat(USER, tools=[{"name": "f"}]) == "with tools"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "from json"}')
    assert Tokenizer.from_folder(tmp_path).render_chat(USER) == "from config"
    (tmp_path / "chat_template.jinja").write_text("from jinja")
    assert Tokenizer.from_folder(tmp_path).render_chat(USER, tools=[{"name": "f"}]) == "from jinja"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("with tools of a file")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.render_chat(USER) == "from jinja"
    assert tokenizer.render_chat(USER, tools=[{"name": "f"}]) == "with tools of a file"


def test_an_object_of_templates_is_read_as_a_list_and_a_processors_file_only_where_there_is_no_other(tmp_path):
    assert with_template(tmp_path / "a", {"default": "one", "tool_use": "two"}).render_chat(USER, tools=[{"name": "f"}]) == "two"
    path = folders.write_folder(tmp_path / "b", folders.chatml_like(), tokenizer_config={}, chat_template={"chat_template": "from json"})
    assert Tokenizer.from_folder(path).render_chat(USER) == "from json"
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("beside it")
    tokenizer = Tokenizer.from_folder(path)
    assert (tokenizer.render_chat(USER), tokenizer.render_chat(USER, tools=[{"name": "f"}])) == ("from json", "beside it")


def test_a_template_that_links_out_of_the_folder_is_refused(tmp_path):
    path = folders.write_folder(tmp_path / "model", folders.chatml_like())
    (tmp_path / "elsewhere.jinja").write_text("secret")
    (path / "inside.txt").write_text("linked")
    (path / "chat_template.jinja").symlink_to(path / "inside.txt")
    assert Tokenizer.from_folder(path).render_chat(USER) == "linked"
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (path / "chat_template.jinja").unlink()
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).symlink_to(tmp_path / "elsewhere.jinja")
        with pytest.raises(TokenizerError, match=r"is a link out of .*elsewhere\.jinja; copy the file there"):
            Tokenizer.from_folder(path)
        (path / "chat_template.jinja").touch()


def test_named_templates_without_a_default_are_refused_with_their_names(tmp_path):
    tokenizer = with_template(tmp_path, [{"name": "rag", "template": "x"}])
    with pytest.raises(TokenizerError, match=r"\['rag'\].*'default'"):
        tokenizer.encode_chat(USER)



@pytest.mark.parametrize(("message", "said"), [
    ({"role": "assistant", "content": None}, ""), ({"role": "assistant"}, ""), ({"role": "assistant", "content": None, "tool_calls": []}, ""),
    ({"role": "assistant", "content": None, "refusal": "I cannot."}, "I cannot."),
    ({"role": "assistant", "content": "Yes.", "refusal": None}, "Yes."),
    ({"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]}, "I cannot."),
    ({"role": "assistant", "content": [{"type": "text", "text": "Well."}, {"type": "refusal", "refusal": "No."}], "refusal": None},
     [{"type": "text", "text": "Well."}, {"type": "text", "text": "No."}]),
])
def test_an_assistant_that_said_nothing_or_refused_is_a_message_all_the_same(kinds, message, said):
    wanted = [*USER, {"role": "assistant", "content": said}, *USER]
    for kind in KINDS:
        assert kinds[kind].encode_chat([*USER, message, *USER]) == kinds[kind].encode_chat(wanted), kind


@pytest.mark.parametrize(("template", "wanted"), [
    ("{% for m in messages %}{{ m['role'] + ':' + m['content'] }};{% endfor %}", "user:hello;assistant:;"),
    ("{% for m in messages %}{{ m.content | trim }};{% endfor %}", "hello;;"),
    ("{% for m in messages %}{% if m['content'] is none %}{{ m.tool_calls[0].id }}{% else %}{{ m['content'] }}{% endif %};{% endfor %}", "hello;c1;"),
    ("{% for m in messages %}{% if m.content != None %}{{ m.content }}{% else %}call{% endif %};{% endfor %}", "hello;call;"),
    ("{% for m in messages %}{% if 'content' in m %}has{% endif %};{% endfor %}", "has;has;"),
])
def test_a_null_content_beside_tool_calls_is_none_to_a_template_that_asks_and_else_no_text(tmp_path, template, wanted):
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}]}
    tokenizer = with_template(tmp_path, template)
    assert tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "hello"}, call])) == wanted


@pytest.mark.parametrize("message", [{"role": "assistant", "refusal": 3}, {"role": "assistant", "content": [{"type": "refusal"}]}])
def test_a_refusal_that_is_no_text_is_refused(kinds, message):
    with pytest.raises(PromptError, match=r"\['refusal'\] is a (int|NoneType); it must be a text"):
        kinds["chatml"].encode_chat([*USER, message])
