"""Compiles a chat template so that what it does can be bounded: in a time of its own, with doors where Jinja's code would act by itself."""
import itertools

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.visitor
from jinja2 import nodes

from tpllm.tokenizer.template_filters import CONCAT, SPREAD, TAKE, TICK
from tpllm.tokenizer.template_limits import Clock, TemplateLimitError
from tpllm.tokenizer.template_sandbox import Sandbox, sandbox

MAX_SOURCE_CHARS = 1_000_000
MAX_NODES = 20_000
"""The most nodes of the parsed template; a long one of a real model has two thousand. Python compiles what they become in one call."""
MAX_ARGUMENTS = 255
"""The most arguments of one call: Python's compiler compares the names of each two."""
MAX_LARGE_NUMBERS, PLAIN_INT = 1000, 2**31
"""Constants beyond that, or with a fraction: Python keeps one of each, and they may be chosen to have one hash."""
MAX_BRANCHED_NAMES = 1_000_000
"""Branches times assignments: Jinja's compiler copies the table of names for each branch."""


def parse_template(source: str) -> nodes.Template:
    """The tree of a template, which knows its environment.

    Raises:
        TemplateLimitError: it is too long to be compiled in a time like that of a rendering.
        jinja2.TemplateError: it is wrong.
    """
    if len(source) > MAX_SOURCE_CHARS:
        raise TemplateLimitError(f"has {len(source)} characters and may have {MAX_SOURCE_CHARS}")
    environment = sandbox()
    environment.code_generator_class = _CodeGenerator
    environment.add_extension(_TimedStream)
    environment.clock = Clock()
    tree = environment.parse(source)
    _check_size(tree)
    return tree


def compile_template(tree: nodes.Template) -> jinja2.Template:
    """The template of a tree, which is changed."""
    environment = tree.environment
    tree = _Bounds().visit(tree)
    tree.set_environment(environment)
    return environment.from_string(tree)


def _check_size(tree: nodes.Template) -> None:
    every = list(itertools.islice(tree.find_all(nodes.Node), MAX_NODES + 1))
    if len(every) > MAX_NODES:
        raise TemplateLimitError(f"has over {MAX_NODES} parts (names, numbers, operators, tags)")
    if any(len(getattr(node, "args", None) or ()) + len(getattr(node, "kwargs", None) or ()) > MAX_ARGUMENTS for node in every):
        raise TemplateLimitError(f"calls something with over {MAX_ARGUMENTS} arguments")
    numbers = [node.value for node in every if isinstance(node, nodes.Const) and isinstance(node.value, int | float)]
    if sum(isinstance(value, float) or abs(value) > PLAIN_INT for value in numbers) > MAX_LARGE_NUMBERS:
        raise TemplateLimitError(f"holds over {MAX_LARGE_NUMBERS} numbers that are large or have a fraction")
    num_branches = sum(isinstance(node, nodes.If | nodes.Block) for node in every)
    if num_branches * sum(isinstance(node, nodes.Name) and node.ctx != "load" for node in every) > MAX_BRANCHED_NAMES:
        raise TemplateLimitError(f"assigns to so many names beside {num_branches} branches that it takes too long to compile")


class _TimedStream(jinja2.ext.Extension):
    """Looks at the clock at each token while a template is parsed."""

    def filter_stream(self, stream):
        for token in stream:
            self.environment.clock.check_time()
            yield token


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """Looks at the clock while it writes Python; what a template puts out, constant text too, goes through the environment's doors."""

    environment: Sandbox

    def write(self, x: str) -> None:
        self.environment.clock.check_time()
        super().write(x)

    def _output_const_repr(self, group) -> str:
        return f"environment.constant({super()._output_const_repr(group)})"

    def _output_child_pre(self, node, frame, finalize) -> None:
        self.write(finalize.src)

    def _output_child_post(self, node, frame, finalize) -> None:
        self.write(")")


class _Bounds(jinja2.visitor.NodeTransformer):
    """Puts doors into a parsed template: a look at the clock into each loop, a count behind each literal, comparison, slice, ``~`` and
    ``*`` before an argument."""

    def visit_For(self, node):
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(None), TICK, node.lineno), lineno=node.lineno))
        return node

    def visit_Concat(self, node):
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), CONCAT, node.lineno)

    def visit_Call(self, node):
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = _filter(node.dyn_args, SPREAD, node.lineno)
        return node

    visit_Filter = visit_Call  # noqa: N815  (Jinja's names)
    visit_Test = visit_Call  # noqa: N815

    def visit_Compare(self, node):
        return _filter(self.generic_visit(node), TAKE, node.lineno)

    def visit_Getitem(self, node):
        self.generic_visit(node)
        return _filter(node, TAKE, node.lineno) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node):
        self.generic_visit(node)
        is_small = all(isinstance(child, nodes.Const) for child in node.iter_child_nodes()) or getattr(node, "ctx", "load") != "load"
        return node if is_small else _filter(node, TAKE, node.lineno)

    visit_Dict = visit_List  # noqa: N815
    visit_Tuple = visit_List  # noqa: N815


def _filter(node: nodes.Expr, name: str, line: int) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=line)
