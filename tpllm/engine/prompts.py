"""The forms a prompt may have, and their token ids."""
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tpllm.engine.sampling_params import SamplingParams
from tpllm.errors import PromptError, TokenizerError, short
from tpllm.tokenizer import Tokenizer

Prompt = str | Mapping[str, Any] | Sequence[int]
Messages = list[dict[str, Any]]
Requests = Iterable[Prompt | tuple[Prompt, SamplingParams]]
CHAT_OPTIONS = ("template_kwargs", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "parse_special")


def is_token_ids(value: Any) -> bool:
    """Whether something is the token ids of one prompt: a list, an array or the like that begins with a whole number."""
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__") or not len(value):
        return False
    first = next(iter(value))
    return isinstance(first, numbers.Integral) and not isinstance(first, bool)


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A prompt's text, where it has one, and its token ids.

    Args:
        prompt: text, token ids, ``{"prompt": text}``, ``{"prompt_token_ids": [...]}`` or ``{"messages": [...]}``; beside messages there may be
            what :meth:`tpllm.tokenizer.Tokenizer.encode_chat` takes, such as ``template_kwargs`` and ``tools``. Special-token
            text in a text is read as special tokens, as in transformers, vLLM and llama.cpp, and in messages it is text; ``parse_special`` beside
            either says otherwise.
        tokenizer: None serves token ids only.

    Returns:
        ``{"prompt": text or None, "prompt_token_ids": [...]}``, itself a valid prompt; of messages the text is what the template makes of them.

    Raises:
        PromptError: another form, or no text.
        TokenizerError: text without a tokenizer, or a chat that the template refuses.
    """
    prompt = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt} if is_token_ids(prompt) else prompt
    if not isinstance(prompt, Mapping):
        raise PromptError(f"a prompt is {prompt!r}; give text, {{'prompt': ...}}, {{'prompt_token_ids': [...]}} or {{'messages': [...]}}")
    parse_special = prompt.get("parse_special")
    if not isinstance(parse_special, bool | None):
        raise PromptError(f"parse_special is {short(parse_special)}; it must be true or false")
    if "prompt_token_ids" in prompt:
        return {"prompt": prompt.get("prompt"), "prompt_token_ids": _ids(prompt["prompt_token_ids"])}
    if tokenizer is None:
        raise TokenizerError("this model has no tokenizer; give the prompt as {'prompt_token_ids': [...]}")
    if "messages" in prompt:
        options = {name: prompt[name] for name in CHAT_OPTIONS if prompt.get(name) is not None}
        text, token_ids = tokenizer.chat_prompt(prompt["messages"], **options)
        return {"prompt": text, "prompt_token_ids": token_ids}
    text = prompt.get("prompt")
    if "role" in prompt:
        raise PromptError(f"a prompt is {short(prompt)}, a message of a chat; give the messages to chat(...), or as {{'messages': [...]}}")
    if not isinstance(text, str):
        raise PromptError(f"a prompt is {short(text)}; it must be text")
    if not text:
        raise PromptError("the prompt is empty; give at least one character")
    return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, parse_special=parse_special)}


def _ids(ids: Any) -> list[int]:
    try:
        if isinstance(ids, str | bytes | Mapping):
            raise TypeError
        # What is no whole number, True and False included, is left for the check of every id, which names it.
        return [operator.index(token) if hasattr(token, "__index__") and not isinstance(token, bool) else token for token in ids]
    except TypeError:
        raise PromptError(f"prompt_token_ids is {ids!r}; give a list of token ids") from None
