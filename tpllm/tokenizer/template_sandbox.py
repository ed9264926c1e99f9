"""The Jinja environment of chat templates: what Hugging Face's templates count on, in a sandbox that keeps to :mod:`template_limits`."""
import datetime

import jinja2
import jinja2.ext
import jinja2.sandbox
import jinja2.utils
from jinja2 import nodes

from tpllm.tokenizer import template_costs as costs
from tpllm.tokenizer.template_filters import install, settled, spread, written
from tpllm.tokenizer.template_limits import budget
from tpllm.tokenizer.traced_text import TracedText, filled, joined

_JINJAS_OWN = ("_loop_vars", "_block_vars")
"""Arguments that Jinja's compiler adds to calls, for functions that ask for the context."""


def sandbox() -> jinja2.Environment:
    """A fresh environment."""
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols],
                          optimized=False, finalize=written)  # not optimized: that would compute constants while it compiles, unchecked
    del environment.globals["lipsum"]
    install(environment)
    environment.globals.update(namespace=_Namespace, raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Bounds and counts what operators and calls make."""

    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)
    concat = staticmethod(joined)

    def __init__(self, **options):
        super().__init__(**options)
        self._constants: dict[str, TracedText] = {}

    def constant(self, text: str) -> TracedText:
        """Text that stands in the template, on its way to the output."""
        if text not in self._constants:
            self._constants[text] = TracedText(text, ())
        return budget().take(self._constants[text])

    def call_binop(self, context, operator, left, right):
        has_user = budget().enter(left, right)
        if operator == "+" and isinstance(left, list) and isinstance(right, list):
            return budget().take_sum(left, right)
        if operator == "*":
            costs.allow_product(budget(), left, right)
        elif operator == "**":
            costs.allow_power(budget(), left, right)
        elif operator == "%" and isinstance(left, str):
            costs.allow_percent(budget(), left, right)
            left = TracedText(left, ()) if has_user and type(left) is str else left
        return settled(super().call_binop(context, operator, left, right), has_user=has_user)

    def call(__self, __context, __obj, *args, **kwargs):  # noqa: N805  (kwargs are the template's, of any name)
        method = getattr(__obj, "__wrapped__", __obj)  # of str.format, which the sandbox wraps
        owner = getattr(method, "__self__", None)
        if __obj is dict or (isinstance(owner, str) and method.__name__ == "join"):
            args = tuple(arg if isinstance(arg, dict | list) else spread(arg) for arg in args)
        given = {name: value for name, value in kwargs.items() if name not in _JINJAS_OWN}
        has_user = budget().enter(owner, *args, *given.values())
        if __obj is dict:
            costs.allow_mapping(args)
        if not isinstance(owner, str):  # methods of other values give what is in them, which knows whose it is
            return settled(super().call(__context, __obj, *args, **kwargs), has_user=has_user and owner is None)
        costs.allow_method(budget(), owner, method.__name__, args, given)
        if not has_user:
            return budget().take(super().call(__context, __obj, *args, **kwargs))
        if method is not __obj:
            return budget().take(filled(owner, __obj, args, given))
        if type(owner) is str:
            __obj = getattr(TracedText(owner, ()), method.__name__)
        return settled(super().call(__context, __obj, *args, **kwargs), has_user=True)

    def is_safe_attribute(self, obj, attr, value):
        return (not callable(value) or costs.is_safe_method(obj, attr)) and super().is_safe_attribute(obj, attr, value)


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
    costs.allow_time_format(format)
    return datetime.datetime.now().strftime(format)
