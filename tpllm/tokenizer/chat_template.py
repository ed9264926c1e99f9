"""Chat templates: Jinja as Hugging Face writes it, in a sandbox."""
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from tpllm.errors import MAX_SHOWN, PromptError, TokenizerError, log, short
from tpllm.tokenizer.folder import DEFAULT_TEMPLATE
from tpllm.tokenizer.messages import joined_parts
from tpllm.tokenizer.template_compiler import compile_template, parse_template
from tpllm.tokenizer.template_limits import MAX_BYTES, Budget, TemplateLimitError
from tpllm.tokenizer.tool_arguments import ArgumentForms, find_forms
from tpllm.tokenizer.traced_text import TracedText

TOOL_TEMPLATE = "tool_use"


class ChatTemplate:
    """One template, compiled at its first use.

    Args:
        source: Jinja text.
        label: what errors call it.
        is_for_tools: whether it is there for chats with tools, even if it does not read them.
    """

    def __init__(self, source: str, label: str, *, is_for_tools: bool = False):
        self.source, self.label, self.is_for_tools = source, label, is_for_tools
        self._forms: ArgumentForms | None = None
        self._has_told_of_tools = self._asks_for_none = False

    def argument_forms(self, names: Mapping[str, str]) -> ArgumentForms:
        """How the template takes the arguments of earlier tool calls; ``names`` are the texts of the tokens that have one."""
        def render(messages: list[dict], tools: list[dict] | None) -> str | None:
            try:
                return self._render(messages, {**names, "tools": tools, "documents": None, "add_generation_prompt": False})
            except TokenizerError:
                return None
        if self._forms is None:
            self._forms = find_forms(render)
        return self._forms

    def render(self, messages: list[dict], context: Mapping) -> TracedText:
        """The prompt's text, which knows what of it stood in a :class:`TracedText` of the messages or the context.

        Args:
            messages: their parts are passed on as a list where the template loops over them, else joined by newlines; content that is None as it is
                where the template asks whether it is none, else as ``""``.
            context: the template's own variables. Where it does not read ``tools``, they change nothing, as in transformers; the log says so once.

        Raises:
            TokenizerError: the template is wrong, refuses the messages (it holds the template's own message), or comes to a limit of
            :mod:`tpllm.tokenizer.template_limits`.
        """
        if context.get("tools") and not self._compiled[2] and not self._has_told_of_tools:
            self._has_told_of_tools = True
            log.warning("the %s does not read tools: prompts are made without them", self.label)
        return self._render(messages, context)

    def _render(self, messages: list[dict], context: Mapping) -> TracedText:
        template, reads_parts, _ = self._compiled
        if not reads_parts:
            messages = [joined_parts(message) for message in messages]
        if not self._asks_for_none:
            messages = [{**message, "content": ""} if message.get("content", "") is None else message for message in messages]
        try:
            with Budget():
                text = template.render({**context, "messages": messages})
        except TemplateLimitError as error:
            raise TokenizerError(f"the {self.label} {error} on these messages and is stopped; shorten the messages, or correct the template in the "
                                 "model's folder") from error
        except jinja2.TemplateError as error:
            raise TokenizerError(f"the {self.label} refuses these messages: {_line(error.message)}; "
                                 "change the messages, or the template in the model's folder") from error
        except Exception as error:  # the template is a program of somebody else's: it can fail in any way
            raise TokenizerError(f"the {self.label} fails on these messages: {type(error).__name__}: {_line(error)}; "
                                 "change the messages, or the template in the model's folder") from error

        if len(text) > MAX_BYTES or (not text.isascii() and len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES):
            raise TokenizerError(f"the {self.label} makes a prompt of over {MAX_BYTES // 1_000_000} MB; shorten the messages")
        return text

    @property
    def _compiled(self) -> tuple[jinja2.Template, bool, bool]:
        """The template; whether it loops over parts; whether it reads ``tools``, or is there for them."""
        if isinstance(self._outcome, str):
            raise TokenizerError(self._outcome)
        return self._outcome

    @functools.cached_property
    def _outcome(self) -> tuple[jinja2.Template, bool, bool] | str:
        """As :attr:`_compiled`, or why it cannot be compiled, which is found out once and not for each row."""
        try:
            tree = parse_template(self.source)
            takes_tools = self.is_for_tools or any(name.name == "tools" for name in tree.find_all(jinja2.nodes.Name))
            reads_parts, self._asks_for_none = _loops_over_content(tree), _asks_for_no_content(tree)
            return compile_template(tree), reads_parts, takes_tools
        except TemplateLimitError as error:
            return f"the {self.label} {error} while it is compiled; shorten it in the model's folder"
        except jinja2.TemplateSyntaxError as error:
            return f"the {self.label} has a syntax error in line {error.lineno}: {_line(error.message)}; correct it in the model's folder"
        except Exception as error:  # nested too deeply for Jinja or for Python
            return f"the {self.label} cannot be compiled: {type(error).__name__}: {_line(error)}; correct it in the model's folder"


def choose_template(templates: Mapping[str, str], *, has_tools: bool) -> ChatTemplate:
    """The ``tool_use`` template where there are tools and such a template, else the default one.

    Raises:
        TokenizerError: there is no template to take; it says where to put one.
    """
    name = TOOL_TEMPLATE if has_tools and TOOL_TEMPLATE in templates else DEFAULT_TEMPLATE
    if name in templates:
        label = "chat template" if name == DEFAULT_TEMPLATE else f"chat template {name!r}"
        return ChatTemplate(templates[name], label, is_for_tools=name == TOOL_TEMPLATE)
    if templates:
        raise TokenizerError(f"the model has the chat templates {sorted(templates)} and none of the name {DEFAULT_TEMPLATE!r}; "
                             "save the one to use as chat_template.jinja in the model's folder")
    raise TokenizerError("the model has no chat template; put one into its folder as chat_template.jinja, or give prompts instead of messages")


def given_template(source: str, named: tuple[str, ...]) -> ChatTemplate:
    """The template that a call brings; ``named`` are the texts of the tokens that have a name, on which its forms of arguments depend.

    Raises:
        PromptError: no text.
    """
    if not isinstance(source, str):
        raise PromptError(f"chat_template is {short(source)}; give Jinja text")
    return _given(source, named)


@functools.lru_cache(maxsize=32)
def _given(source: str, named: tuple[str, ...]) -> ChatTemplate:
    return ChatTemplate(source, "chat template of this call")


def read_template(template: str | Path) -> str:
    """The template of a text that is one, or of a file.

    Raises:
        TokenizerError: a file that cannot be read, or a text that is neither.
    """
    if isinstance(template, str) and any(sign in template for sign in "{}\n"):
        return template
    try:
        return Path(template).read_text("utf-8")
    except (OSError, UnicodeDecodeError, TypeError) as error:
        raise TokenizerError(f"chat_template is {short(template)}, which is neither Jinja text nor a file that can be read ({error})") from None


def up_to_last_message(text: TracedText, messages: Sequence[Mapping]) -> TracedText:
    """What a template made of messages, as far as the last one's own text goes.

    Raises:
        PromptError: the last message has no text, or the template does not show it as it is.
    """
    content = messages[-1].get("content") or ""
    content = content if isinstance(content, str) else content[-1]["text"]
    start = str.rfind(text, content.strip()) if content.strip() else -1
    if start < 0:
        raise PromptError("continue_final_message is true, but the chat template does not show the text of the last message as it is; use a prompt")
    shown = content.lstrip() if str.startswith(text, content.lstrip(), start) else content.strip()
    return text[:start + len(shown)]


def _line(message: object) -> str:
    """What a template or a library says, as a part of one line."""
    text = " ".join(str(message)[:4 * MAX_SHOWN].split())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _loops_over_content(tree: jinja2.nodes.Template) -> bool:
    """Whether the template has a loop over a message's ``content``."""
    return any(_is_content(loop.iter) for loop in tree.find_all(jinja2.nodes.For))


def _asks_for_no_content(tree: jinja2.nodes.Template) -> bool:
    """Whether the template compares a message's ``content`` with none."""
    tests = (test.node for test in tree.find_all(jinja2.nodes.Test) if test.name == "none")
    compared = (compare.expr for compare in tree.find_all(jinja2.nodes.Compare)
                if any(isinstance(other.expr, jinja2.nodes.Const) and other.expr.value is None for other in compare.ops))
    return any(map(_is_content, (*tests, *compared)))


def _is_content(node: jinja2.nodes.Node) -> bool:
    while isinstance(node, jinja2.nodes.Filter):
        node = node.node
    if isinstance(node, jinja2.nodes.Getitem):
        return isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == "content"
    return (isinstance(node, jinja2.nodes.Getattr) and node.attr == "content") or (isinstance(node, jinja2.nodes.Name) and node.name == "content")
