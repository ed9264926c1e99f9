"""The messages of a chat, checked and made of plain JSON values, which are all that a template gets to touch."""
import re
from collections.abc import Iterable, Mapping

from tpllm.errors import PromptError, short
from tpllm.tokenizer.traced_text import TracedText

MAX_DEPTH = 100
"""How deep a chat's values may be nested: Python's own stack is not much deeper."""
_WORD = re.compile(r"[\w -]+", re.ASCII)
TEXT_PARTS = ("text", "input_text", "output_text")
ROLES = frozenset(("assistant", "developer", "function", "ipython", "model", "observation", "system", "tool", "user"))
REFUSAL = "refusal"
"""A message of the assistant's, or a part of one, that says no: in OpenAI's API it stands under this key instead of the content or the text."""


def checked_messages(messages: object) -> list[dict]:
    """Messages as plain dicts; keys whose value is None are left out, as templates expect.

    ``content`` stays a text, or becomes a list of ``{"type": "text", "text": ...}``. What the assistant refused with is what it said; an assistant's
    message without content or tool calls said nothing, ``""``. A null content beside tool calls stays None.

    Raises:
        PromptError: not a list of messages; it names the index and the fix.
    """
    if not isinstance(messages, list | tuple):
        raise PromptError(f"messages is a {type(messages).__name__}; give a list of {{'role': ..., 'content': ...}}")
    if not messages:
        raise PromptError("messages is empty; give at least one {'role': 'user', 'content': ...}")
    return [_checked_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def plain_value(value: object, where: str, *, depth: int = 0) -> object:
    """A copy made of dict, list, str, int, float, bool and None only, so that a template meets no methods of other objects.

    Raises:
        PromptError: another type, a text that UTF-8 cannot hold, or values nested over 100 deep.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return checked_text(str.__str__(value), where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if depth > MAX_DEPTH:
        raise PromptError(f"{where[:80]}... is nested over {MAX_DEPTH} deep; give less nested values")
    if isinstance(value, Mapping):
        return {plain_value(key, where): plain_value(item, f"{where}[{short(key)}]", depth=depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item, f"{where}[{index}]", depth=depth + 1) for index, item in enumerate(value)]
    raise PromptError(f"{where} is a {type(value).__name__}; use only what JSON can hold")


def traced_messages(messages: list[dict], *, framing: Iterable[str] = ()) -> list[dict]:
    """Messages whose texts know that they are a user's.

    A role that is a word is no text of a user's: templates write it into their own marks (``<|user|>``). But the role "end" would make the mark
    ``<|end|>`` of it, and so a word other than those of every model is a user's where it stands in one of ``framing``.

    Args:
        framing: texts of the tokens that begin and end texts.
    """
    framing = [text.casefold() for text in framing]

    def is_role(word: str) -> bool:
        return bool(_WORD.fullmatch(word)) and (word in ROLES or not any(word.casefold() in text for text in framing))
    return [{TracedText(key): value if key == "role" and is_role(value) else traced_value(value) for key, value in message.items()}
            for message in messages]


def traced_value(value: object) -> object:
    """A plain value whose texts know that they are a user's."""
    if isinstance(value, str):
        return TracedText(value)
    if isinstance(value, dict):
        return {traced_value(key): traced_value(item) for key, item in value.items()}
    return [traced_value(item) for item in value] if isinstance(value, list) else value


def checked_text(text: object, where: str) -> str:
    """The text itself.

    Raises:
        PromptError: not a text, or one that holds half of a surrogate pair.
    """
    if not isinstance(text, str):
        raise PromptError(f"{where} is a {type(text).__name__}; it must be a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(f"{where} holds the lone surrogate {text[error.start]!a} at character {error.start}; "
                          "replace it, for instance by U+FFFD") from error
    return text


def joined_parts(message: dict) -> dict:
    """The message with its text parts joined by newlines, for templates that take only texts."""
    if not isinstance(message.get("content"), list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in message["content"])}


def _checked_message(message: object, where: str) -> dict:
    if not isinstance(message, Mapping):
        raise PromptError(f"{where} is a {type(message).__name__}; give a dict {{'role': ..., 'content': ...}}")
    kept = {key: value for key, value in message.items() if value is not None}
    if not isinstance(kept.get("role"), str) or not kept["role"]:
        raise PromptError(f"{where} has the role {message.get('role')!r}; give a text such as 'user', 'assistant' or 'system'")
    _check_calls(kept.get("tool_calls", ()), f"{where}['tool_calls']")
    if "content" in kept:
        kept["content"] = _checked_content(kept["content"], f"{where}['content']")
    elif kept["role"] != "assistant":
        raise PromptError(f"{where} has no content; give a text, or '' for none")
    elif not kept.get("tool_calls"):
        kept["content"] = checked_text(kept.pop(REFUSAL, ""), f"{where}['{REFUSAL}']")
    elif "content" in message:
        kept["content"] = None
    return plain_value(kept, where)


def _check_calls(calls: object, where: str) -> None:
    wrong = [(where, calls)] if not isinstance(calls, list | tuple) else [
        (f"{where}[{index}]", call) for index, call in enumerate(calls) if not isinstance(call, Mapping)]
    if wrong:
        name, value = wrong[0]
        what = "an object" if value is not calls else "a list of objects"
        raise PromptError(f"{name} is {short(value)}; give {what} such as {{'type': 'function', 'function': {{'name': ..., 'arguments': ...}}}}")


def _checked_content(content: object, where: str) -> str | list[dict]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise PromptError(f"{where} is a {type(content).__name__}; it must be a text or a list of {{'type': 'text', 'text': ...}}")
    return [_checked_part(part, f"{where}[{index}]") for index, part in enumerate(content)]


def _checked_part(part: object, where: str) -> dict:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Mapping) and part.get("type") == REFUSAL:
        return {"type": "text", "text": checked_text(part.get(REFUSAL), f"{where}['{REFUSAL}']")}
    if not isinstance(part, Mapping) or part.get("type") not in TEXT_PARTS:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise PromptError(f"{where} is of the type {kind!r}; only {{'type': 'text', 'text': ...}} is read")
    return {"type": "text", "text": checked_text(part.get("text"), f"{where}['text']")}
