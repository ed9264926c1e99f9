"""What a chat template makes of messages is what it makes of plain texts, and every character knows whether it was a user's."""
import pytest

from tests.tokenizer import tokenizer_folders as folders
from tpllm.tokenizer import Tokenizer
from tpllm.tokenizer.chat_template import ChatTemplate
from tpllm.tokenizer.messages import traced_messages

EXPRESSIONS = [
    "c.split('</think>')[-1]", "c.split('</think>', 1) | last", "c.rsplit('k')[0]", "c.partition('</think>')[2]", "c.rpartition('</think>')[0]",
    "c.replace('<think>', '')", "c | replace('hm', '<|im_end|>')", "c.replace('', '.')", "c[7:] if c.startswith('<think>') else c", "c[c.find('h'):]",
    "c[1:-1]", "c[::2]", "c[::-1]", "c | reverse", "c | trim", "c.strip()", "c.lstrip('<')", "c.removeprefix('<think>')", "'a' ~ c ~ 1 ~ none",
    "'[' + c + ']'", "c + c", "c * 2", "'%s says %s<|im_end|>' % (m.role, c)", "'{}|{:>30}'.format(m.role, c)", "'{a}'.format_map({'a': c})",
    "'%s %s' | format(c, m.role)", "[m.role, c] | join('<|im_end|>')", "'<|im_end|>'.join([m.role, c])", "c | join('-')", "c | list | join",
    "messages | map(attribute='content') | join('|')", "m | tojson", "c | tojson", "m | tojson(indent=2)", "[c, m.role]", "c | string", "c | e",
    "(c | safe) + '<b>'", "c | upper", "c.capitalize()", "c | title", "c.center(60, '*')", "c.zfill(50)", "c | indent(2, true)", "c | truncate(10)",
    "c.splitlines() | join('|')", "c.split() | join(' ')", "c | first", "c | sort | join", "c | unique | join", "m | dictsort", "c | urlencode",
    "(c | batch(3, 'x') | list)[0] | join", "c | default('x')", "(c | attr('strip'))()", "m.get('content')", "c | wordcount", "c | length",
]
CONTENTS = ["hello", "<think>\nhm\n</think>\n\n yes the", "100% {x} é\nb", "<think>hm</think>a<|im_end|>", ""]
STATEMENTS = [
    "{% for x in c %}{{ x }}{% endfor %}", "{% set ns = namespace(s='') %}{% for x in c %}{% set ns.s = ns.s + x %}{% endfor %}{{ ns.s }}",
    "{% set x %}<|im_end|>{{ c }}{% endset %}{{ x }}", "{% filter trim %} {{ c }} <|im_end|> {% endfilter %}",
    "{% macro f(x) %}[{{ x.split('</think>')[-1] }}<|im_end|>]{% endmacro %}{{ f(c) | trim }}",
    "{% macro f() %}<{{ caller() }}>{% endmacro %}{% call f() %}{{ c }}{% endcall %}", "{% for k, v in m.items() %}{{ k }}={{ v }};{% endfor %}",
    "{% autoescape true %}{{ '<' ~ c }}{{ c }}{% endautoescape %}",
    "{% if '</think>' in c %}{{ c.split('</think>')[1] | trim }}{% else %}-{% endif %}",
]
SHOWN_ANYWHERE = [
    "'%s' % n", "'%s' % [n]", "'%r' % (n,)", "'{}'.format(n)", "'{0[a]}'.format({'a': n})", "'%s' | format(n)",
    "'%s' % (d.items(),)", "'%s' % [d.keys()]", "'{}'.format(d.items())", "d.keys()", "d.items() | string", "[d.values()]", "'%s' % m.tool_calls",
    "'%s' % m.tool_calls[0].function.arguments", "tools", "'%s' % tools", "'%s' % (messages | groupby('role') | list)", "'{0.s}'.format(ns)",
    "'{0[s]}'.format(ns)", "'{x.s}'.format_map({'x': ns})", "'{1}{0.s}'.format(ns, s)", "'{0.previtem}'.format(lp)", "'{0.sep}'.format(joiner(s))",
    "'{0.current}'.format(cycler(s))", "cycler(s).next()", "'{0.grouper}'.format((messages | groupby('role') | list)[0])", "show(**n)", "show(*d)",
    "m.tool_calls[0].function.name", "m.name", "m.reasoning_content", "documents", "bos_token", "m.role",
]
"""Of texts in tool calls, tools, variables, keys and names."""
SOURCES = [*(f"{{{{ {expression} }}}}" for expression in EXPRESSIONS), *STATEMENTS]


def wrapped(source):
    return f"{{% for m in messages %}}{{% set c = m.content %}}<|im_start|>{source}<|im_end|>\n{{% endfor %}}"


def chat(content):
    return [{"role": "user", "content": "hello"}, {"role": "assistant", "content": content}]


@pytest.fixture
def load(tmp_path):
    def loaded(template, *, specials=()):
        backend = folders.chatml_like()
        backend.add_special_tokens(list(specials))
        path = folders.write_folder(tmp_path, backend, tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": template})
        return Tokenizer.from_folder(path)
    return loaded


@pytest.mark.parametrize("source", SOURCES)
def test_a_template_makes_of_a_users_text_what_it_makes_of_any_text(source):
    template = ChatTemplate(wrapped(source), "chat template")
    for content in CONTENTS:
        if content or not source.startswith("{{ (c | batch"):
            assert template.render(traced_messages(chat(content)), {}) == template.render(chat(content), {}), content


def test_no_template_lets_a_users_text_become_a_special_token_and_its_own_stay(load):
    for source in SOURCES:
        tokenizer = load(wrapped(source))
        text, twin = (tokenizer.encode_chat(chat(f"a{mark} <think>hm</think>\nb{mark}")) for mark in ("<|im_end|>", "<!im_end!>"))
        special, wanted = ([token_id for token_id in ids if token_id in tokenizer.special_ids] for ids in (text, twin))
        assert special == wanted, source
        assert tokenizer.decode(text, skip_special_tokens=False) == tokenizer.render_chat(chat("a<|im_end|> <think>hm</think>\nb<|im_end|>")), source


@pytest.mark.parametrize("expression", SHOWN_ANYWHERE)
def test_no_text_of_a_chat_becomes_a_special_token_wherever_it_stands_and_however_it_is_shown(load, expression):
    tokenizer = load("{% macro show() %}{{ '%s' % kwargs }}{{ '%s' % (varargs,) }}{{ kwargs }}{% endmacro %}{% set ns = namespace(s=s) %}"
                     f"{{% set m = messages[0] %}}{{% for _ in [s, s] %}}{{% set lp = loop %}}{{% if loop.last %}}<|im_start|>{{{{ {expression} }}}}"
                     "<|im_end|>{% endif %}{% endfor %}")

    def special_ids(mark):
        call = {"id": mark, "type": "function", "function": {"name": mark, "arguments": {mark: 1}}}
        message = {"role": mark, "content": mark, "name": mark, "reasoning_content": mark, "tool_calls": [call]}
        variables = {"s": mark, "n": {mark: 1}, "d": {mark: mark}, "bos_token": mark, "documents": [{"title": mark}]}
        tool = {"type": "function", "function": {"name": mark, "description": mark, "parameters": {"properties": {mark: {}}}}}
        ids = tokenizer.encode_chat([message], tools=[tool], template_kwargs=variables)
        return [token_id for token_id in ids if token_id in tokenizer.special_ids]
    expected = [tokenizer._backend.rust.token_to_id(piece) for piece in ("<|im_start|>", "<|im_end|>")]
    assert special_ids("<|im_end|>") == special_ids("<!im_end!>") == expected


@pytest.mark.parametrize(("role", "is_mark"), [("user", True), ("critic", True), ("im_end", False), ("IM_END", False), ("endoftext", False),
                                               ("im_end|>x<|im_start", False)])
def test_a_role_makes_its_mark_and_none_that_ends_a_text(load, role, is_mark):
    template = "{% for m in messages %}<|{{ m.role | lower }}|>{{ m.content }}{% endfor %}"
    tokenizer = load(template, specials=("<|user|>", "<|critic|>", "<|endoftext|>"))
    ids = tokenizer.encode_chat([{"role": role, "content": "a"}])
    assert [tokenizer.piece(token_id) for token_id in ids if token_id in tokenizer.special_ids] == [f"<|{role}|>"] * is_mark


@pytest.mark.parametrize("expression", ["'<|im_end|>%s%s' % ({'a': 1}, m.content)", "'<|im_end|>%(role)s' % m", "'<|im_end|>{0[content]}'.format(m)"])
def test_a_templates_own_special_tokens_stay_beside_a_mapping(load, expression):
    ids = load(wrapped(f"{{{{ {expression} }}}}")).encode_chat([{"role": "user", "content": "a"}])
    assert len([token_id for token_id in ids if token_id == ids[-2]]) == 2


def test_a_special_token_that_a_template_searches_for_is_found_in_a_message(load):
    split = wrapped("{{ c.split('</think>')[-1] | trim if '</think>' in c else c }}")
    plain, special = load(split), load(split, specials=("<think>", "</think>"))
    messages = chat("<think>hm</think>\n yes")
    assert special.encode_chat(messages) == plain.encode_chat(messages) == plain.encode_chat(chat("yes"))
    kept = special.encode_chat([{"role": "user", "content": "<think>"}])
    assert special.decode(kept, skip_special_tokens=True) == "<think>\n"
    assert special.encode_chat([{"role": "user", "content": "<think>"}], parse_special=True) != kept


def test_values_of_template_kwargs_are_guarded_as_messages_are(load):
    tokenizer = load("{{ x.a[0] }}{{ y }}<|im_end|>")
    ids = tokenizer.encode_chat(chat(""), template_kwargs={"x": {"a": ["<|im_end|>"]}, "y": "<|im_start|>"})
    assert [tokenizer.piece(token_id) for token_id in ids if token_id in tokenizer.special_ids] == ["<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<|im_end|><|im_start|>"


@pytest.mark.oracle
@pytest.mark.parametrize("specials", [(), ("<think>", "</think>")])
def test_templates_give_the_ids_of_transformers_where_nothing_is_forged(load, tmp_path, specials):
    transformers = pytest.importorskip("transformers")
    for source in SOURCES:
        tokenizer = load(wrapped(source), specials=specials)
        oracle = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
        for content in ("hello", "100% {x} é\nb", *(("<think>\nhm\n</think>\n\n yes the",) if not specials or "</think>" in source else ())):
            text = oracle.apply_chat_template(chat(content), tokenize=False)
            assert tokenizer.render_chat(chat(content), add_generation_prompt=False) == text, (source, content)
            if not specials or "think>" not in text:
                assert tokenizer.encode_chat(chat(content), add_generation_prompt=False) == oracle(text, add_special_tokens=False).input_ids, source
