"""Chat templates: Jinja as Hugging Face writes it, in a sandbox."""
import datetime
import functools
import json
from collections.abc import Mapping

import jinja2
import jinja2.ext
import jinja2.sandbox

from tpllm.errors import TokenizerError
from tpllm.tokenizer.folder import DEFAULT_TEMPLATE
from tpllm.tokenizer.messages import joined_parts

TOOL_TEMPLATE = "tool_use"


class ChatTemplate:
    """One template, compiled at its first use.

    Args:
        source: Jinja text.
        label: what errors call it.
    """

    def __init__(self, source: str, label: str):
        self.source, self.label = source, label

    def render(self, messages: list[dict], context: Mapping) -> str:
        """The prompt's text; the template's own variables come from ``context``.

        Message parts are passed on as a list where the template loops over them, else joined by newlines.

        Raises:
            TokenizerError: the template is wrong, or refuses the messages; it holds the template's own message.
        """
        template, reads_parts = self._compiled
        if not reads_parts:
            messages = [joined_parts(message) for message in messages]
        try:
            return template.render({**context, "messages": messages})
        except jinja2.TemplateError as error:
            raise TokenizerError(f"the {self.label} refuses these messages: {error.message}; "
                                 "change the messages, or the template in the model's folder") from error
        except Exception as error:  # the template is a program of somebody else's: it can fail in any way
            raise TokenizerError(f"the {self.label} fails on these messages: {type(error).__name__}: {error}; "
                                 "change the messages, or the template in the model's folder") from error

    @functools.cached_property
    def _compiled(self) -> tuple[jinja2.Template, bool]:
        environment = _environment()
        try:
            return environment.from_string(self.source), _loops_over_content(environment.parse(self.source))
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(f"the {self.label} has a syntax error in line {error.lineno}: {error.message}; "
                                 "correct it in the model's folder") from error


def choose_template(templates: Mapping[str, str], *, has_tools: bool) -> ChatTemplate:
    """The ``tool_use`` template where there are tools and such a template, else the default one.

    Raises:
        TokenizerError: there is no template to take; it says where to put one.
    """
    name = TOOL_TEMPLATE if has_tools and TOOL_TEMPLATE in templates else DEFAULT_TEMPLATE
    if name in templates:
        return ChatTemplate(templates[name], "chat template" if name == DEFAULT_TEMPLATE else f"chat template {name!r}")
    if templates:
        raise TokenizerError(f"the model has the chat templates {sorted(templates)} and none of the name {DEFAULT_TEMPLATE!r}; "
                             "save the one to use as chat_template.jinja in the model's folder")
    raise TokenizerError("the model has no chat template; put one into its folder as chat_template.jinja, or give prompts instead of messages")


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks what the model said, for training; here its body is just rendered, in a scope of its own."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _environment() -> jinja2.Environment:
    """The settings, functions and filters that Hugging Face's templates count on."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                               extensions=[_GenerationTag, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter escapes < > & ' for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message):
    raise jinja2.TemplateError(str(message))


def _strftime_now(format):  # noqa: A002  (templates may name it)
    return datetime.datetime.now().strftime(format)


def _loops_over_content(tree: jinja2.nodes.Template) -> bool:
    """Whether the template has a loop over a message's ``content``."""
    return any(_is_content(loop.iter) for loop in tree.find_all(jinja2.nodes.For))


def _is_content(node: jinja2.nodes.Node) -> bool:
    while isinstance(node, jinja2.nodes.Filter):
        node = node.node
    if isinstance(node, jinja2.nodes.Getitem):
        return isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == "content"
    return (isinstance(node, jinja2.nodes.Getattr) and node.attr == "content") or (isinstance(node, jinja2.nodes.Name) and node.name == "content")
