"""Chat templates that would run or grow without end are stopped, whatever they do it with; others are not disturbed."""
import threading
import tracemalloc

import pytest
from jinja2 import nodes

from tpllm.errors import TokenizerError
from tpllm.tokenizer import template_compiler, template_limits
from tpllm.tokenizer.chat_template import ChatTemplate

USER = [{"role": "user", "content": "hello"}]

ENDLESS = [
    "{% set r = range(99999) | list %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in [[]] recursive %}{% for i in range(9999) %}{% for j in range(9999) if false %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ range(9999) | map('string') | list | length }}{% endfor %}",
    "{% for i in range(99999) %}{{ ('a' * 900000) | select('eq', 'b') | list | length }}{% endfor %}",
    "{% macro f() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}{% call f() %}{% call f() %}{% endcall %}{% endcall %}",
    "{% for i in range(99999) %}{% filter upper %}{% for j in range(9999) %}{% continue %}{% endfor %}{% endfilter %}{% endfor %}",
]
HUGE = [
    "{{ 'a' * 10**10 }}", "{{ 'x' * 4000000000 }}", "{{ 4000000000 * 'x' }}", "{{ [1] * 10**9 }}", "{{ (1, 2) * 10**9 }}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s=[]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=()) %}{% for i in range(60) %}{% set ns.s = (ns.s, ns.s) %}{% endfor %}",
    "{% set ns = namespace(s={}) %}{% for i in range(60) %}{% set ns.s = {'a': ns.s, 'b': ns.s} %}{% endfor %}",
    "{% set ns = namespace(s={}) %}{% for i in range(60) %}{% set ns.s = dict(a=ns.s, b=ns.s) %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='') %}{% for i in range(60) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}abc{% endset %}{% endfor %}",
    "{% set ns = namespace(s='%') %}{% for i in range(60) %}{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = '{0}{0}'.format(ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='aa') %}{% for i in range(60) %}{% set ns.s = ns.s.replace('a', ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='aa') %}{% for i in range(60) %}{% set ns.s = ns.s | replace('a', ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s.join(ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s | join(ns.s) %}{% endfor %}",
    "{{ 'a' | center(10**9) }}", "{{ 'a' | center(1000000000) }}", "{{ 'a'.center(10**9) }}", "{{ 'a'.ljust(10**9) }}", "{{ 'a'.rjust(10**9) }}",
    "{{ '1'.zfill(10**9) }}", "{{ '%1000000000d' % 1 }}", "{{ '%(a)1000000000d' % {'a': 1} }}", "{{ '%(a(b))1000000000d' % {'a(b)': 1} }}",
    "{{ '%*d' % (1000000000, 1) }}", "{{ '%.1000000000f' % 1 }}", "{{ '%1000000000d' | format(1) }}", "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}", "{{ '{0[a]:1000000000}'.format({'a': 1}) }}", "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "{{ ['a', 'b'] | map('center', 1000000000) | list }}", "{{ ('a' * 100000).join('b' * 100000) }}", "{{ (['b'] * 100000) | join('a' * 100000) }}",
    "{{ ('\n' * 100000) | indent(100000) }}", "{{ 'a\nb' | indent(10**9) }}", "{{ [1] | batch(10**9, 0) | list }}", "{{ [1] | slice(10**9) | list }}",
    "{{ {'a': [1]} | tojson(indent=10**9) }}", "{{ [[[1] * 100000]] | tojson(indent=100000) }}", "{{ ('a' * 300000 ~ '\n') * 14 }}",
    "{% for i in range(99999) %}{% set x = ('a' * 500000 ~ i).split('b') %}{% endfor %}",
    "{% for i in range(99999) %}" + "words " * 1000 + "{% endfor %}",
    "{% set x %}{% for i in range(99999) %}" + "words " * 1000 + "{% endfor %}{% endset %}",
    "{% macro f() %}{% for i in range(99999) %}{{ 'words' * 1000 }}{% endfor %}{% endmacro %}{% set x = f() %}",
    "{{ 'é' * 2000001 }}", "{{ messages[0].content * 1000000 }}",
]
COSTLY = [
    "{{ 2 ** (10**10) }}", "{{ 10 ** (10 ** 10) }}", "{{ 10 ** -(10 ** 10) }}", "{{ (2 ** 4000) ** 4000 }}",
    "{{ 1.5 | round(10**9, 'ceil') }}", "{{ 5 | round(-1000000000) }}",
    "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
    "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n ** 2 %}{% endfor %}",
    "{{ [[1], [2]] | sum(start=[]) }}", "{{ ('a' * 3000000).strip('b' * 3000000 ~ 'a') }}", "{{ ('a' * 3000000) | trim('b' * 3000000 ~ 'a') }}",
]
UNSAFE = [
    "{{ (1).to_bytes(10**10, 'big') }}", "{{ 'a'.encode() }}", "{{ ('\t' * 1000).expandtabs(10**9) }}", "{{ 'a'.translate({97: 'x' * 100000}) }}",
    "{{ {}.fromkeys(range(9), 1) }}", "{{ ('a' | attr('encode'))() }}", "{{ 'a'['encode']() }}",
]


def render(source, messages=USER, **context):
    return ChatTemplate(source, "chat template").render(messages, context)


@pytest.mark.parametrize(("source", "num_turns"), [
    ("{% for i in range(30) %}{% endfor %}", 30), ("{% for i in range(5) %}{% for j in range(6) %}{% continue %}{% endfor %}{% endfor %}", 5 + 30),
    ("{% for x in [[], []] recursive %}{% for j in range(9) if j %}{% endfor %}{% endfor %}", 2 + 16),
    ("{% macro f() %}{% for i in range(30) %}{% endfor %}{% endmacro %}{% set x = f() %}", 30),
    ("{% filter upper %}{% for i in range(30) %}{% if i %}{% break %}{% endif %}{% endfor %}{% endfilter %}", 2),
])
def test_the_clock_is_looked_at_in_each_turn_of_a_loop(source, num_turns, monkeypatch):
    looks = []
    monkeypatch.setattr(template_limits.Budget, "check_time", lambda _: looks.append(None))
    monkeypatch.setattr(template_limits.Budget, "take", lambda _, value: value)  # it looks too, at each value that is made
    render(source)
    assert len(looks) >= num_turns


@pytest.mark.parametrize("source", ENDLESS)
def test_a_template_that_runs_too_long_is_stopped(source, monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.1)
    with pytest.raises(TokenizerError, match=r"the chat template runs for over 0\.1 s on these messages .*; shorten the messages, or correct"):
        render(source)


def test_the_limits_are_a_second_and_four_megabytes():
    assert (template_limits.MAX_SECONDS, template_limits.MAX_BYTES) == (1, 4_000_000)
    assert len(render("{{ 'a' * 3999990 }}0123456789")) == 4_000_000
    with pytest.raises(TokenizerError, match="makes a prompt of over 4 MB; shorten the messages"):
        render("{{ 'a' * 3999990 }}01234567890")


@pytest.mark.parametrize("source", HUGE)
def test_a_template_that_makes_too_much_is_stopped(source, monkeypatch):
    monkeypatch.setattr("tpllm.tokenizer.template_limits.MAX_SECONDS", 20)  # on a busy machine the clock may be first
    with pytest.raises(TokenizerError, match=r"makes (a value|a prompt|values) of over (4|256) MB|takes the (width|format) of a field from"):
        render(source)


@pytest.mark.parametrize("source", ["{{ 'a'.center(10**9) }}", "{{ '1'.zfill(10**9) }}", "{{ ('a' * 10000).replace('a', 'b' * 10000) }}",
                                    "{{ '{:1000000000}'.format(1) }}", "{{ '%1000000000d' % 1 }}"])
def test_what_is_too_much_is_refused_before_it_is_made(source):
    template = ChatTemplate(source, "chat template")
    tracemalloc.start()
    try:
        with pytest.raises(TokenizerError, match="makes a value of over 4 MB"):
            template.render(USER, {})
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("source", COSTLY)
def test_arithmetic_whose_time_explodes_is_stopped(source):
    with pytest.raises(TokenizerError, match=r"a whole number of over 4096 bits|rounds to|only numbers can be added|strips \d+ different characters"):
        render(source)


@pytest.mark.parametrize("source", [
    "{% macro f() %}{{ varargs | length }}{% endmacro %}{{ f(*('a' * 3900000)) }}", "{{ 'a' | replace(*('a' * 3900000)) }}",
    "{% macro f() %}{{ varargs | length }}{% endmacro %}{{ f(*(messages[0].content * 100000)) }}",
    "{{ ('a' * 3900000) | list | length }}", "{{ 'x'.join('a' * 3900000) }}",
])
def test_what_is_gone_through_in_one_call_is_bounded(source):
    with pytest.raises(TokenizerError, match="goes through over 100000 elements at once"):
        render(source)


@pytest.mark.parametrize("source", UNSAFE)
def test_methods_that_no_chat_needs_and_no_bound_holds_are_unsafe(source):
    with pytest.raises(TokenizerError, match="unsafe"):
        render(source)


@pytest.mark.parametrize("source", [
    "{% set n = namespace() %}{% set m = namespace(a=n, b=n) %}{% set n.a = m %}{% set n.b = m %}{{ n }}{{ n ~ [m] }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "".join(f"{{% for x{i} in [1] %}}" for i in range(30)) + "{% endfor %}" * 30,
    "x" * 1_000_001,
    "{{ 'a' | urlize }}",
])
def test_other_ways_to_go_wrong_end_in_an_error_or_a_short_text(source):
    try:
        assert len(render(source)) < 100
    except TokenizerError:
        pass


def test_of_a_template_of_too_many_parts_no_more_are_looked_at(monkeypatch):
    looked, find_all = [], nodes.Node.find_all
    monkeypatch.setattr(nodes.Node, "find_all", lambda node, kind: looked.append(0) or find_all(node, kind))
    with pytest.raises(TokenizerError, match=f"over {template_compiler.MAX_NODES} parts"):
        render(f"{{{{ [{'1,' * 3 * template_compiler.MAX_NODES}] }}}}")
    assert len(looked) <= template_compiler.MAX_NODES + 10


def test_the_limits_hold_in_other_threads(monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.1)
    errors = []

    def work():
        try:
            render(ENDLESS[1])
        except TokenizerError as error:
            errors.append(error)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(errors) == 2


def test_a_template_that_was_stopped_works_for_other_messages(monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.1)
    template = ChatTemplate("{% for i in range(messages[0].n) %}{% for j in range(99999) %}{% endfor %}{% endfor %}done", "chat template")
    for _ in range(2):
        with pytest.raises(TokenizerError, match="runs for over"):
            template.render([{"role": "user", "content": "", "n": 99999}], {})
        assert template.render([{"role": "user", "content": "", "n": 1}], {}) == "done"


def test_a_long_chat_is_no_endless_one():
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 100} for i in range(2000)]
    source = ("{% set ns = namespace(kept=[]) %}{% for m in messages %}{% set ns.kept = ns.kept + [m] %}{% endfor %}"
              "{% for m in ns.kept %}<|{{ m.role }}|>{{ m.content | trim }}\n{% endfor %}")
    assert render(source, messages) == "".join(f"<|{m['role']}|>{m['content'].strip()}\n" for m in messages)


@pytest.mark.parametrize(("source", "text"), [
    ("{{ '%s is %d%%' % ('it', 5) }} {{ '%5.1f|%-4s|' % (1.25, 'a') }}", "it is 5%   1.2|a   |"),
    ("{{ '{{\"name\": \"{0}\", \"n\": {n:03d}}}'.format('f', n=7) }}", '{"name": "f", "n": 007}'),
    ("{{ ['a', 'b'] | join(', ') }}{{ [{'x': 1}, {'x': 2}] | join('-', 'x') }}{{ ', '.join(['c', 'd']) }}", "a, b1-2c, d"),
    ("{{ 'a\nb' | indent(2) }}{{ 'a\nb' | indent('>', true) }}", "a\n  b>a\n>b"),
    ("{{ 'x'.center(5) }}|{{ 'x' | center(3) }}|{{ '7'.zfill(3) }}", "  x  | x |007"),
    ("{{ 'a-b' | replace('-', '+') }}{{ 'aaa'.replace('a', 'b', 2) }}", "a+bbba"),
    ("{{ [1, 2, 3] | batch(2, 0) | list }}{{ [1, 2, 3] | slice(2) | list }}{{ [1, 2] | sum }}{{ [{'n': 2}] | sum('n', 1) }}",
     "[[1, 2], [3, 0]][[1, 2], [3]]33"),
    ("{{ 2.567 | round(1) }} {{ 2.5 | round(0, 'floor') }} {{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 10 }}", "2.6 2.0 3 3 1024"),
    ("{{ 1 - 3 }} {{ 3 / 2 }} {{ 'ab' * 2 }} {{ 2 * [1] }}", "-2 1.5 abab [1, 1]"),
    ("{{ 'a' ~ 1 ~ none ~ x ~ [1] }}{{ '  s ' | trim }}{{ '--s-'.strip('-') }}", "a1None[1]ss"),
    ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}", "['hello']"),
    ("{% set a, b = (1, [2]) %}{{ a }}{{ b }}{{ {'k': [a]}.k[0] }}{{ [1] + [2] }}{{ (1,) + (2,) }}", "1[2]1[1, 2](1, 2)"),
    ("{% filter upper | trim %} a{{ 'b' }} {% endfilter %}{% set x | upper %}c{% endset %}{{ x }}", "ABC"),
    ("{% macro m(a, b=[1]) %}{{ a }}{{ b }}{{ caller() if caller else '' }}{% endmacro %}{{ m(1) }}{% call m(2) %}in{% endcall %}", "1[1]2[1]in"),
    ("{% for a in [1, 2, 3] if a != 2 %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{% else %}no{% endfor %}", "1False22True2"),
    ("{% autoescape true %}{{ '<' ~ '&' }}{% endautoescape %}<", "&lt;&amp;<"),
    ("{{ {'a': [1, '<é>']} | tojson }}{{ {'b': 1, 'a': {'c': 2}} | tojson(indent=1, sort_keys=true) }}",
     '{"a": [1, "<é>"]}{\n "a": {\n  "c": 2\n },\n "b": 1\n}'),
])
def test_what_the_checks_stand_before_does_what_it_did(source, text):
    assert render(source) == text


def test_tools_are_left_out_by_a_template_that_does_not_read_them_and_the_log_says_so_once(caplog):
    tools = [{"type": "function"}]
    assert render("{{ tools | length }}", tools=tools) == "1"
    assert not caplog.records
    template = ChatTemplate("{{ messages | length }}", "chat template")
    assert [template.render(USER, {"tools": tools}) for _ in range(3)] == ["1"] * 3
    assert [record.getMessage() for record in caplog.records] == ["the chat template does not read tools: prompts are made without them"]
