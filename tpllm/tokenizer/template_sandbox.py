"""The Jinja environment of chat templates: what Hugging Face's templates count on, in a sandbox that keeps to :mod:`template_limits`."""
import datetime

import jinja2
import jinja2.ext
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor
from jinja2 import nodes

from tpllm.tokenizer.template_filters import BUDGET, CONCAT, FILTERS, TAKE, TICK
from tpllm.tokenizer.template_limits import Budget

NOT_FOR_CHATS = ("pprint", "urlize", "wordwrap", "xmlattr")
"""Filters for web pages, whose output or time no simple bound holds."""
UNSAFE_METHODS = {str: ("encode", "expandtabs", "maketrans", "translate"), int: ("from_bytes", "to_bytes"), dict: ("fromkeys",)}
PADDING = ("center", "ljust", "rjust", "zfill")
STRIPPING = ("lstrip", "rstrip", "strip")


def sandbox() -> jinja2.Environment:
    """A fresh environment."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols],
                           optimized=False, finalize=_written)  # not optimized: that would compute constants while it compiles, unchecked
    for name in NOT_FOR_CHATS:
        del environment.filters[name]
    del environment.globals["lipsum"]
    environment.filters.update(FILTERS)
    environment.globals.update(namespace=_Namespace, raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


def compile_template(environment: jinja2.Environment, tree: nodes.Template) -> jinja2.Template:
    """A template whose loops, filters and literals keep to the limits; the tree is changed."""
    tree = _Bounds().visit(tree)
    tree.set_environment(environment)
    return environment.from_string(tree)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Counts what operators and calls make."""

    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)

    def call_binop(self, context, operator, left, right):
        budget = context.parent[BUDGET]
        if operator == "+" and isinstance(left, list) and isinstance(right, list):
            weight = budget.weigh(left) + budget.weigh(right)
            budget.allow(weight)
            result = left + right
            budget.remember(result, weight)
            return budget.take(result)
        if operator == "*":
            budget.allow_product(left, right)
        elif operator == "**":
            budget.allow_power(left, right)
        elif operator == "%" and isinstance(left, str):
            budget.allow_percent(left, right)
        else:
            budget.allow_int(left, right)
        return budget.take(super().call_binop(context, operator, left, right))

    def call(__self, __context, __obj, *args, **kwargs):  # noqa: N805  (kwargs are the template's, of any name)
        budget = __context.parent[BUDGET]
        method = getattr(__obj, "__wrapped__", __obj)  # of str.format, which the sandbox wraps
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            args = _bounded_arguments(budget, text, method.__name__, args, kwargs)
        budget.check_time()
        return budget.take(super().call(__context, __obj, *args, **kwargs))

    def call_filter(self, name, value, args=None, kwargs=None, context=None, eval_ctx=None):
        return context.parent[BUDGET].take(super().call_filter(name, value, args, kwargs, context, eval_ctx))

    def call_test(self, name, value, args=None, kwargs=None, context=None, eval_ctx=None):
        context.parent[BUDGET].check_time()
        return super().call_test(name, value, args, kwargs, context, eval_ctx)

    def is_safe_attribute(self, obj, attr, value):
        kind = obj if isinstance(obj, type) else type(obj)
        is_unsafe = any(issubclass(kind, base) and attr in names for base, names in UNSAFE_METHODS.items())
        return not is_unsafe and super().is_safe_attribute(obj, attr, value)


def _bounded_arguments(budget: Budget, text: str, name: str, args: tuple, kwargs: dict) -> tuple:
    """The arguments of a text's method, once what it makes of them is small enough."""
    if name in PADDING and args and isinstance(args[0], int):
        budget.allow(args[0])
    elif name == "replace" and len(args) >= 2:
        budget.allow_replace(text, *args[:2])
    elif name in ("format", "format_map"):
        budget.allow_braces(text, [list(args), kwargs])
    elif name in STRIPPING:
        budget.allow_strip(args[0] if args else None)
    elif name == "join" and len(args) == 1:
        args = (list(args[0]),)
        budget.allow_join(text, *args)
    return args


class _Bounds(jinja2.visitor.NodeTransformer):
    """Puts checks into a parsed template: a look at the clock into each loop, a count behind each filter, literal and ``~``, and constant
    text is written as an expression is, so that it is counted."""

    def visit_For(self, node):
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(None), TICK, node.lineno), lineno=node.lineno))
        return node

    def visit_Filter(self, node):
        return _filter(self.generic_visit(node), TAKE, node.lineno)

    def visit_Concat(self, node):
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), CONCAT, node.lineno)

    def visit_TemplateData(self, node):
        return nodes.Const(node.data, lineno=node.lineno)

    def visit_List(self, node):
        self.generic_visit(node)
        is_small = all(isinstance(child, nodes.Const) for child in node.iter_child_nodes()) or getattr(node, "ctx", "load") != "load"
        return node if is_small else _filter(node, TAKE, node.lineno)

    visit_Dict = visit_List  # noqa: N815  (Jinja's names)
    visit_Tuple = visit_List  # noqa: N815


def _filter(node: nodes.Expr, name: str, line: int) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=line)


@jinja2.pass_context
def _written(context, value):
    return context.parent[BUDGET].take(value if isinstance(value, str) else str(value))


class _Namespace(jinja2.utils.Namespace):
    """One whose text does not hold its values: they may hold each other."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks what the model said, for training; here its body is just rendered, in a scope of its own."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _raise_exception(message):
    raise jinja2.TemplateError(str(message))


def _strftime_now(format):  # noqa: A002  (templates may name it)
    return datetime.datetime.now().strftime(format)
