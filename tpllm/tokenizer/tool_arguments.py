"""The arguments of earlier tool calls, as text or as an object: OpenAI's API has JSON text, Hugging Face's documentation objects, and a template may
take one of the two or both. A template is tried once with both, on a chat of its own, and each call's arguments are given to it as it takes them.

Taken as text means that the text stands in the prompt as it is: not quoted once more, as ``tojson`` does with it. Taken as an object means that the
keys stand there, but not as Python writes a dict.
"""
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

KEY, VALUE = "depthOf", "harbour7"
OBJECT = {KEY: VALUE}
TEXT = json.dumps(OBJECT)
CALL_ID = "a1b2c3d4e"  # Mistral's templates want nine letters and digits
TOOL = {"type": "function", "function": {"name": "measure", "description": "Measures.", "parameters": {
    "type": "object", "properties": {KEY: {"type": "string", "description": "Where."}}, "required": [KEY]}}}


class ToolArguments(dict):
    """Arguments as an object that were given as text.

    Attributes:
        text: the text.
    """

    def __init__(self, text: str, parsed: Mapping[str, Any]):
        super().__init__(parsed)
        self.text = text


@dataclasses.dataclass(frozen=True)
class ArgumentForms:
    """The forms in which a template takes arguments; neither if it does not show them, or not in the chat that it was tried with."""

    takes_text: bool
    takes_object: bool


def find_forms(render: Callable[[list[dict], list[dict] | None], str | None]) -> ArgumentForms:
    """Try a template.

    Args:
        render: messages and tools -> the prompt, None where the template fails.
    """
    for tools in ([TOOL], None):
        for has_answer in (True, False):
            as_text, as_object = (render(_chat(arguments, has_answer=has_answer), tools) or "" for arguments in (TEXT, OBJECT))
            forms = ArgumentForms(TEXT in as_text, VALUE in as_object and KEY in as_object and f"'{KEY}'" not in as_object)
            if forms.takes_text or forms.takes_object:
                return forms
    return ArgumentForms(False, False)


def with_taken_arguments(messages: Any, get_forms: Callable[[], ArgumentForms]) -> Any:
    """Messages with the arguments of their tool calls in a form that the template takes, where there is one; what is no chat is left as it is.

    Args:
        messages: of a chat.
        get_forms: asked only where there are arguments.
    """
    if not isinstance(messages, list | tuple) or not any(map(_calls, messages)):
        return messages
    forms = get_forms()
    return [{**message, "tool_calls": [_converted(call, forms) for call in _calls(message)]} if _calls(message) else message for message in messages]


def _calls(message: Any) -> Sequence[Any]:
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    return calls if isinstance(calls, list | tuple) else ()


def _converted(call: Any, forms: ArgumentForms) -> Any:
    """A call, whose function stands below ``function`` or, as some write it, in the call itself."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _converted(call["function"], forms)}
    return {**call, "arguments": _in_form(call["arguments"], forms)} if "arguments" in call else call


def _in_form(arguments: Any, forms: ArgumentForms) -> Any:
    text = arguments.text if isinstance(arguments, ToolArguments) else arguments
    if isinstance(text, str):
        return text if forms.takes_text else _parsed(text, is_needed=forms.takes_object, otherwise=arguments)
    if isinstance(arguments, Mapping) and forms.takes_text and not forms.takes_object:
        return json.dumps(arguments, ensure_ascii=False)
    return arguments


def _parsed(text: str, *, is_needed: bool, otherwise: Any) -> Any:
    try:
        parsed = json.loads(text or "{}") if is_needed else None
    except (ValueError, RecursionError):
        parsed = None
    return parsed if isinstance(parsed, dict) else otherwise


def _chat(arguments: Any, *, has_answer: bool) -> list[dict]:
    call = {"id": CALL_ID, "type": "function", "function": {"name": "measure", "arguments": arguments}}
    chat = [{"role": "user", "content": "How deep is it?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return chat + [{"role": "tool", "tool_call_id": CALL_ID, "name": "measure", "content": "7 m"}] * has_answer
