"""What an OpenAI body gives the model to read: texts or token ids of a completion, messages and tools of a chat."""
import json
from collections.abc import Mapping
from typing import Any

from tpllm.engine.prompts import Prompt
from tpllm.engine.whole_numbers import whole
from tpllm.errors import PromptError
from tpllm.openai_api.api_error import ApiError, shortened
from tpllm.tokenizer.messages import checked_messages
from tpllm.tokenizer.tool_arguments import ToolArguments


def completion_prompts(prompt: object) -> tuple[Prompt, ...]:
    """The prompts of a completion: a text, a list of token ids, or a list of several of one kind.

    Raises:
        ApiError: another form.
    """
    if prompt is None:
        raise ApiError("prompt is missing; give text, a list of token ids, or a list of several of them", param="prompt",
                       code="missing_required_parameter")
    if isinstance(prompt, str):
        return (prompt,)
    if ids := _ids(prompt):
        return ({"prompt_token_ids": ids},)
    if isinstance(prompt, list) and prompt:
        if all(isinstance(text, str) for text in prompt):
            return tuple(prompt)
        if all(several := list(map(_ids, prompt))):
            return tuple({"prompt_token_ids": ids} for ids in several)
    raise ApiError(f"prompt is {shortened(prompt)}; it must be text, a list of token ids, a list of texts, or a list of lists of token ids",
                   param="prompt", code="invalid_type")


def with_parse_special(prompts: tuple[Prompt, ...], parse_special: object) -> tuple[Prompt, ...]:
    """Prompts that say whether special-token text in them is read as special tokens; where a body does not, texts do and messages do not.

    Raises:
        ApiError: neither true nor false.
    """
    if parse_special is None:
        return prompts
    if not isinstance(parse_special, bool):
        raise ApiError(f"parse_special is {shortened(parse_special)}; it must be true or false", param="parse_special", code="invalid_type")
    return tuple({**({"prompt": prompt} if isinstance(prompt, str) else prompt), "parse_special": parse_special} for prompt in prompts)


def chat_prompt(given: Mapping[str, Any]) -> Prompt:
    """The prompt of a chat: its messages, and ``chat_template_kwargs``, ``reasoning_effort`` (one more variable of the template, where those do not
    name it), ``add_generation_prompt`` and ``tools``.

    Arguments of earlier tool calls, which OpenAI writes as JSON text, become objects that keep their text: the tokenizer gives the template the form
    that it takes.

    Raises:
        ApiError: messages that are no chat, parts other than text, tools or a choice of tool that cannot be served.
    """
    if "messages" not in given:
        raise ApiError('messages is missing; give a list such as [{"role": "user", "content": "..."}]', param="messages",
                       code="missing_required_parameter")
    try:
        messages = checked_messages(given["messages"])
    except PromptError as error:
        raise ApiError(str(error), param="messages", code="invalid_value") from None
    variables = given.get("chat_template_kwargs", {})
    if not isinstance(variables, Mapping):
        raise ApiError(f"chat_template_kwargs is {shortened(variables)}; it must be an object", param="chat_template_kwargs", code="invalid_type")
    if "reasoning_effort" in given:
        variables = {"reasoning_effort": given["reasoning_effort"], **variables}
    if not isinstance(given.get("add_generation_prompt", True), bool):
        raise ApiError(f"add_generation_prompt is {shortened(given['add_generation_prompt'])}; it must be true or false",
                       param="add_generation_prompt", code="invalid_type")
    prompt = {"messages": [_with_parsed_arguments(message, f"messages[{index}]") for index, message in enumerate(messages)]}
    options = {"template_kwargs": variables, "tools": _tools(given), "add_generation_prompt": given.get("add_generation_prompt")}
    return {**prompt, **{name: value for name, value in options.items() if value not in (None, {}, [])}}


def _tools(given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    tools, choice = given.get("tools", []), given.get("tool_choice", "auto")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ApiError(f"tools is {shortened(tools)}; it must be a list of objects", param="tools", code="invalid_type")
    for index, tool in enumerate(tools):
        _check_function(tool, f"tools[{index}]", param="tools")
    if choice not in ("auto", "none"):
        raise ApiError(f"tool_choice is {shortened(choice)}; only \"auto\" and \"none\" are supported: nothing forces a call yet",
                       param="tool_choice", code="unsupported_value")
    return [] if choice == "none" else tools


def _with_parsed_arguments(message: dict[str, Any], where: str) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = [_with_parsed_call(call, f"{where}['tool_calls'][{index}]") for index, call in enumerate(message["tool_calls"])]
    return {**message, "tool_calls": calls}


def _with_parsed_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    _check_function({**call, "type": call.get("type") or "function"}, where, param="messages")
    function, arguments = call["function"], call["function"].get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise ApiError(f"{where}['function']['arguments'] is {shortened(arguments)}; it must be JSON", param="messages",
                           code="invalid_value") from None
        if isinstance(arguments, dict):
            arguments = ToolArguments(function["arguments"], arguments)
    elif arguments is not None and not isinstance(arguments, dict):
        raise ApiError(f"{where}['function']['arguments'] is {shortened(arguments)}; it must be JSON text, or an object", param="messages",
                       code="invalid_type")
    return {**call, "function": {**function, **({"arguments": arguments} if "arguments" in function else {})}}


def _check_function(given: Mapping[str, Any], where: str, *, param: str) -> None:
    """A tool, or a call of one, is of a function that has a name."""
    if given.get("type") != "function":
        raise ApiError(f"{where} is of the type {shortened(given.get('type'))}; only functions are supported", param=param, code="unsupported_value")
    function = given.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ApiError(f'{where} is {shortened(given)}; it must be {{"type": "function", "function": {{"name": "...", ...}}}}', param=param,
                       code="invalid_type")


def _ids(value: object) -> list[int] | None:
    """Token ids; None where it is no list of them."""
    ids = list(map(whole, value)) if isinstance(value, list) else []
    return ids if ids and all(type(token) is int for token in ids) else None
