"""The filters and tests of chat templates, each behind the same door: what goes in is weighed and bounded before, what comes out is counted after."""
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator

import jinja2
import jinja2.filters
import jinja2.runtime
from markupsafe import escape

from tpllm.tokenizer import template_costs as costs
from tpllm.tokenizer.template_limits import MAX_BYTES, MAX_ITEMS, budget
from tpllm.tokenizer.traced_text import SafeText, TracedText, by_character, joined, spans_of

NOT_FOR_CHATS = ("pprint", "urlize", "wordwrap", "xmlattr")
"""Filters for web pages, whose output or time no simple bound holds."""
BY_ELEMENT = frozenset(("batch", "dictsort", "groupby", "join", "max", "min", "slice", "sort", "sum", "title", "unique", "urlencode"))
"""Filters that go through the characters of a text one by one, in one call."""
STEP_BY_STEP = frozenset(("list", "map", "reject", "rejectattr", "select", "selectattr"))
"""Filters that take one character, or one element, after the other."""
PASSING = frozenset(("attr", "d", "default", "first", "last", "max", "min", "random"))
"""Filters that give one of the values they get, which knows whose it is."""
TICK, TAKE, CONCAT, SPREAD = "look at the clock", "take a value", "join texts", "spread values"  # names with spaces, which no template can write


def install(environment: jinja2.Environment) -> None:
    """Put the filters and tests of an environment behind their door."""
    for name in NOT_FOR_CHATS:
        del environment.filters[name]
    environment.filters.update(_OWN)
    for table in (environment.filters, environment.tests):
        for name, function in table.items():
            table[name] = _checked(name, function, is_filter=table is environment.filters)
    environment.filters.update({TICK: lambda value: budget().check_time(), TAKE: lambda value: budget().take(value), CONCAT: _concat, SPREAD: spread})


def as_text(value: object) -> TracedText:
    """A value as it is written."""
    if isinstance(value, str):
        return TracedText(str.__str__(value), spans_of(value))
    has_user = budget().enter(value)
    return TracedText(str(value), None if has_user else ())


@jinja2.pass_context
def written(context, value) -> TracedText:
    """What stands in the output for a value."""
    text = as_text(value)
    if context.eval_ctx.autoescape and not hasattr(value, "__html__"):
        text = by_character(text, lambda part: str(escape(part)))
    return budget().take(text)


def spread(values: Iterable) -> list:
    """The elements of a value, which Python would otherwise go through in one call."""
    if isinstance(values, str):
        budget().allow_items(len(values))
    return budget().take(list(itertools.islice(_timed(values), MAX_ITEMS + 1)))


def settled(result, *, has_user: bool):
    """Count what a call made. A new text that was made of a user's is the user's, where the call did not tell its parts apart."""
    return budget().take(TracedText(result) if has_user and type(result) is str else result)


def _checked(name: str, function: Callable, *, is_filter: bool) -> Callable:
    wanted = getattr(function, "jinja_pass_arg", None)
    first = {"context": lambda context: (context,), "eval_context": lambda context: (context.eval_ctx,),
             "environment": lambda context: (context.environment,)}.get(wanted and wanted.name, lambda context: ())

    @jinja2.pass_context
    def checked(context, value, *args, **kwargs):
        has_user = budget().enter(value, *args, *kwargs.values())
        if not is_filter:
            return function(*first(context), value, *args, **kwargs)
        if name in BY_ELEMENT and isinstance(value, str):
            budget().allow_items(len(value))
        elif name in STEP_BY_STEP and isinstance(value, str):
            value = _timed(value)
        if has_user and type(value) is str:
            value = TracedText(value, ())
        return settled(function(*first(context), value, *args, **kwargs), has_user=has_user and name not in PASSING)
    return checked


@jinja2.pass_context
def _concat(context, values):
    budget().enter(*values)
    costs.allow_join(budget(), "", values)
    return budget().take(jinja2.runtime.markup_join(values) if context.eval_ctx.autoescape else joined(map(as_text, values)))


def _timed(values: Iterable) -> Iterator:
    for value in values:
        budget().check_time()
        yield value


def _batch(value, linecount, fill_with=None):
    budget().allow(linecount)
    budget().allow_items(linecount)
    return jinja2.filters.do_batch(value, linecount, fill_with)


def _center(value, width=80):
    budget().allow(width)
    return jinja2.filters.do_center(value, width)


def _format(value, *args, **kwargs):
    costs.allow_percent(budget(), str(value), [list(args), kwargs])
    return jinja2.filters.do_format(value, *args, **kwargs)


def _indent(s, width=4, first=False, blank=False):
    text = str.__str__(s) if type(s) is TracedText else s  # Jinja's function joins lines in a way that loses whose they are
    lines = str(text).splitlines()
    budget().allow_items(len(lines))
    budget().allow(len(str(text)) + (len(lines) + 1) * (width if isinstance(width, int) else len(width)))
    return jinja2.filters.do_indent(text, width, first, blank)


@jinja2.pass_eval_context
def _join(eval_ctx, value, d="", attribute=None):
    items = list(value)
    costs.allow_join(budget(), d, items)
    if eval_ctx.autoescape:
        return jinja2.filters.sync_do_join(eval_ctx, items, d, attribute)
    if attribute is not None:
        items = list(map(jinja2.filters.make_attrgetter(eval_ctx.environment, attribute), items))
    return as_text(d).join(map(as_text, items))


@jinja2.pass_eval_context
def _replace(eval_ctx, s, old, new, count=None):
    costs.allow_replace(budget(), s, old, new)
    return jinja2.filters.do_replace(eval_ctx, s, old, new, count)


def _round(value, precision=0, method="common"):
    costs.allow_rounding(precision)
    return jinja2.filters.do_round(value, precision, method)


def _safe(value):
    return SafeText(as_text(value)) if isinstance(value, str) else jinja2.filters.do_mark_safe(value)


def _slice(value, slices, fill_with=None):
    budget().allow(slices)
    budget().allow_items(slices)
    return jinja2.filters.sync_do_slice(value, slices, fill_with)


def _striptags(value):
    costs.allow_steps(str(value).count("<") * len(str(value)))
    return jinja2.filters.do_striptags(value)


@jinja2.pass_environment
def _sum(environment, iterable, attribute=None, start=0):
    costs.allow_start(start)
    return jinja2.filters.sync_do_sum(environment, iterable, attribute, start)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter escapes < > & ' for HTML, which no model was trained on.
    if indent is None:
        return json.dumps(value, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)
    pieces, size = [], 0
    budget().allow(indent if isinstance(indent, int) else len(indent))
    for piece in json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys).iterencode(value):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_BYTES:
            budget().allow(size)
        budget().check_time()
    return "".join(pieces)


def _trim(value, chars=None):
    costs.allow_strip(chars)
    return jinja2.filters.do_trim(value, chars)


@jinja2.pass_environment
def _unique(environment, value, case_sensitive=False, attribute=None):
    items = list(value)
    getter = jinja2.filters.make_attrgetter(environment, attribute)
    costs.allow_keys(map(getter, items))
    return jinja2.filters.sync_do_unique(environment, items, case_sensitive, attribute)


def _wordcount(s):
    return sum(1 for _ in re.finditer(r"\w+", str(s)))


_OWN = {
    "batch": _batch, "center": _center, "format": _format, "indent": _indent, "join": _join, "replace": _replace, "round": _round, "safe": _safe,
    "slice": _slice, "striptags": _striptags, "sum": _sum, "tojson": _tojson, "trim": _trim, "unique": _unique, "wordcount": _wordcount,
}
