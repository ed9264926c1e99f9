"""Filters of chat templates that are not Jinja's own, and those of its own that can make much of little, behind a check of what they are given."""
import json

import jinja2
import jinja2.filters
import jinja2.runtime

from tpllm.tokenizer.template_limits import MAX_BYTES, MAX_PRECISION, TemplateLimitError

BUDGET = "budget of this rendering"  # names with spaces, which no template can write
TICK, TAKE, CONCAT = "look at the clock", "take a value", "join texts"


@jinja2.pass_context
def _tick(context, value):
    context.parent[BUDGET].check_time()


@jinja2.pass_context
def _take(context, value):
    return context.parent[BUDGET].take(value)


@jinja2.pass_context
def _concat(context, values):
    budget = context.parent[BUDGET]
    budget.allow_join("", values)
    return budget.take((jinja2.runtime.markup_join if context.eval_ctx.autoescape else jinja2.runtime.str_join)(values))


@jinja2.pass_context
def _batch(context, value, linecount, fill_with=None):
    context.parent[BUDGET].allow(linecount)
    return jinja2.filters.do_batch(value, linecount, fill_with)


@jinja2.pass_context
def _center(context, value, width=80):
    context.parent[BUDGET].allow(width)
    return jinja2.filters.do_center(value, width)


@jinja2.pass_context
def _format(context, value, *args, **kwargs):
    context.parent[BUDGET].allow_percent(str(value), [list(args), kwargs])
    return jinja2.filters.do_format(value, *args, **kwargs)


@jinja2.pass_context
def _indent(context, s, width=4, first=False, blank=False):
    text = str(s)
    context.parent[BUDGET].allow(len(text) + (len(text.splitlines()) + 1) * (width if isinstance(width, int) else len(width)))
    return jinja2.filters.do_indent(s, width, first, blank)


@jinja2.pass_context
def _join(context, value, d="", attribute=None):
    items = list(value)
    context.parent[BUDGET].allow_join(d, items)
    return jinja2.filters.sync_do_join(context.eval_ctx, items, d, attribute)


@jinja2.pass_context
def _replace(context, s, old, new, count=None):
    context.parent[BUDGET].allow_replace(s, old, new)
    return jinja2.filters.do_replace(context.eval_ctx, s, old, new, count)


@jinja2.pass_context
def _round(context, value, precision=0, method="common"):
    if abs(precision) > MAX_PRECISION:
        raise TemplateLimitError(f"rounds to {precision} digits; at most {MAX_PRECISION} are allowed")
    return jinja2.filters.do_round(value, precision, method)


@jinja2.pass_context
def _slice(context, value, slices, fill_with=None):
    context.parent[BUDGET].allow(slices)
    return jinja2.filters.sync_do_slice(value, slices, fill_with)


@jinja2.pass_context
def _sum(context, iterable, attribute=None, start=0):
    if not isinstance(start, int | float):
        raise TemplateLimitError(f"adds up from {type(start).__name__}; only numbers can be added up")
    return jinja2.filters.sync_do_sum(context.environment, iterable, attribute, start)


@jinja2.pass_context
def _trim(context, value, chars=None):
    context.parent[BUDGET].allow_strip(chars)
    return jinja2.filters.do_trim(value, chars)


@jinja2.pass_context
def _tojson(context, value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter escapes < > & ' for HTML, which no model was trained on.
    if indent is None:
        return json.dumps(value, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)
    budget, pieces, size = context.parent[BUDGET], [], 0
    budget.allow(indent if isinstance(indent, int) else len(indent))
    for piece in json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys).iterencode(value):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_BYTES:
            budget.allow(size)
        budget.check_time()
    return "".join(pieces)


FILTERS = {
    TICK: _tick, TAKE: _take, CONCAT: _concat, "batch": _batch, "center": _center, "format": _format, "indent": _indent, "join": _join,
    "replace": _replace, "round": _round, "slice": _slice, "sum": _sum, "tojson": _tojson, "trim": _trim,
}
