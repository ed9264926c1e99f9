"""The forms of a prompt as types, under vLLM's names; plain dicts of these keys serve as well."""
from typing import TypedDict


class TextPrompt(TypedDict):
    """A text."""

    prompt: str


class TokensPrompt(TypedDict):
    """Token ids."""

    prompt_token_ids: list[int]
