"""The forms a prompt may have, and their token ids."""
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from tpllm.engine.sampling_params import SamplingParams
from tpllm.errors import PromptError, TokenizerError, short
from tpllm.tokenizer import Tokenizer

Prompt = str | Mapping[str, Any]
Messages = list[dict[str, Any]]
Requests = Iterable[Prompt | tuple[Prompt, SamplingParams]]
CHAT_OPTIONS = ("template_kwargs", "tools", "add_generation_prompt", "parse_special")


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A prompt's text, where it has one, and its token ids.

    Args:
        prompt: text, ``{"prompt": text}``, ``{"prompt_token_ids": [...]}`` or ``{"messages": [...]}``; beside messages there may be
            ``template_kwargs``, ``tools`` and ``add_generation_prompt``, as :meth:`tpllm.tokenizer.Tokenizer.encode_chat` takes them. Special-token
            text in a text is read as special tokens, as in transformers, vLLM and llama.cpp, and in messages it is text; ``parse_special`` beside
            either says otherwise.
        tokenizer: None serves token ids only.

    Returns:
        ``{"prompt": text or None, "prompt_token_ids": [...]}``, itself a valid prompt.

    Raises:
        PromptError: another form, or no text.
        TokenizerError: text without a tokenizer, or a chat that the template refuses.
    """
    prompt = {"prompt": prompt} if isinstance(prompt, str) else prompt
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
        return {"prompt": None, "prompt_token_ids": tokenizer.encode_chat(prompt["messages"], **options)}
    text = prompt.get("prompt")
    if not isinstance(text, str):
        raise PromptError(f"a prompt is {short(text)}; it must be text")
    if not text:
        raise PromptError("the prompt is empty; give at least one character")
    parse_special = not tokenizer.splits_special if parse_special is None else parse_special
    return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, parse_special=parse_special)}


def _ids(ids: Any) -> list[int]:
    try:
        if isinstance(ids, str | bytes | Mapping):
            raise TypeError
        # What is no whole number, True and False included, is left for the check of every id, which names it.
        return [operator.index(token) if hasattr(token, "__index__") and not isinstance(token, bool) else token for token in ids]
    except TypeError:
        raise PromptError(f"prompt_token_ids is {ids!r}; give a list of token ids") from None
