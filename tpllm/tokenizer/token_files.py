"""Tokens that the files beside tokenizer.json name or number, collected as transformers 5.24 collects them.

There a token may be said to be special in many places, and some are read before others; which goes before which decides what a text is cut into.
"""
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers

from tpllm.errors import TokenizerError, short

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OLDER_EXTRAS, EXTRAS = "additional_special_tokens", "extra_special_tokens"
NUMBERED = "added_tokens_decoder"
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
MAX_ID = 2**31 - 1
"""The largest id of a token: ids are 32-bit numbers on devices."""
Token = str | tokenizers.AddedToken


@dataclasses.dataclass(frozen=True)
class TokenFiles:
    """What the files say; a text stands for a special token of that text.

    Attributes:
        named: tokens with a name: ``bos_token``, ..., then those of names that only this model has.
        others: further special tokens.
        numbered: tokens with the ids that tokenizer_config.json gives them or, where it lists none, added_tokens.json.
        is_listed: whether tokenizer_config.json lists its added tokens. Then special_tokens_map.json and added_tokens.json count for nothing.
    """

    named: Mapping[str, Token] = dataclasses.field(default_factory=dict)
    others: tuple[Token, ...] = ()
    numbered: Mapping[int, tokenizers.AddedToken] = dataclasses.field(default_factory=dict)
    is_listed: bool = False

    def texts(self) -> dict[str, str]:
        """The texts of the tokens that have a name, for chat templates and for ids."""
        return {name: text_of(token) for name, token in self.named.items()}


def collect_tokens(path: pathlib.Path, settings: Mapping[str, Any], mapped: Mapping[str, Any], added_ids: Mapping[str, Any]) -> TokenFiles:
    """Tokens of a folder's files.

    Args:
        path: the folder, for messages.
        settings: tokenizer_config.json's values.
        mapped: special_tokens_map.json's values.
        added_ids: added_tokens.json's texts and ids.

    Raises:
        TokenizerError: a token or an id that is none.
    """
    values, where = dict(settings), path / "tokenizer_config.json"
    if not values.get(EXTRAS) and OLDER_EXTRAS in values:
        values[EXTRAS] = values.pop(OLDER_EXTRAS)
    own = _own_names(values) | _object_of_extras(values)
    is_listed = NUMBERED in values
    if not is_listed:
        _merge(values, mapped, where=path / "special_tokens_map.json")
        own |= _object_of_extras(values)
    numbered = _listed(values[NUMBERED] or {}, where) if is_listed else _numbered(added_ids, _special_texts(values), path / "added_tokens.json")
    if OLDER_EXTRAS in values and EXTRAS not in values:
        values[EXTRAS] = values.pop(OLDER_EXTRAS)
    others = values.get(EXTRAS) or []
    if not isinstance(others, list):
        raise TokenizerError(f"{where}: {EXTRAS} is {short(others)}; it must be a list of tokens")
    values = {name: _token(value, f"{where}: {name}") if name.endswith("_token") and isinstance(value, Mapping) else value
              for name, value in values.items()}
    named = {name: values[name] for name in SPECIAL_NAMES if values.get(name) is not None} | {**_own_names(values), **own}
    tokens = {name: _token(value, f"{where}: {name}") for name, value in named.items()}
    further = [_token(value, f"{where}: {EXTRAS}") for value in others]
    return TokenFiles({name: token for name, token in tokens.items() if text_of(token)}, tuple(filter(text_of, further)),
                      dict(sorted(numbered.items())), is_listed)


def text_of(token: object) -> str:
    """The text of a token, ``""`` of what is none."""
    return token if isinstance(token, str) else token.content if isinstance(token, tokenizers.AddedToken) else ""


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold a text, which may have come from JSON's escapes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_id(value: object) -> bool:
    """Whether a token can have this id."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ID


def _own_names(values: dict[str, Any]) -> dict[str, Token]:
    """Takes out the tokens whose names are not the usual ones but end like them."""
    names = [name for name, value in values.items() if name.endswith("_token") and name not in SPECIAL_NAMES and text_of(value)]
    return {name: values.pop(name) for name in names}


def _object_of_extras(values: dict[str, Any]) -> dict[str, Any]:
    """Takes out further special tokens that have names."""
    return values.pop(EXTRAS) if isinstance(values.get(EXTRAS), Mapping) else {}


def _merge(values: dict[str, Any], mapped: Mapping[str, Any], where: pathlib.Path) -> None:
    """special_tokens_map.json goes before tokenizer_config.json, and adds to its further tokens."""
    for name, value in mapped.items():
        if isinstance(value, Mapping) and name != EXTRAS:
            value = _token(value, f"{where}: {name}", is_special=True)
        elif name == EXTRAS and isinstance(value, list):
            before = values.get(EXTRAS) if isinstance(values.get(EXTRAS), list) else []
            tokens = [_token(token, f"{where}: {name}", is_special=True) if isinstance(token, Mapping) else token for token in value]
            value = [*before, *(token for token in tokens if token not in before)]
        values[name] = value


def _special_texts(values: Mapping[str, Any]) -> set[str]:
    """Texts of added_tokens.json that are special tokens. Those that only an object calls so are missing: it is made a token later."""
    others = values.get(EXTRAS)
    return {text_of(values.get(name)) for name in SPECIAL_NAMES} | {text_of(token) for token in (others if isinstance(others, list) else [])}


def _numbered(added_ids: Mapping[str, Any], special: set[str], where: pathlib.Path) -> dict[int, tokenizers.AddedToken]:
    for text, token_id in added_ids.items():
        if not text or not is_id(token_id):
            raise TokenizerError(f"{where}: the id of {short(text)} is {short(token_id)}; it must map texts to ids from 0 to {MAX_ID}")
    # Said, and not left to the library, for a token that becomes special later does not change in this.
    return {token_id: _token({"content": text, "normalized": text not in special}, where, is_special=text in special)
            for text, token_id in added_ids.items()}


def _listed(numbered: object, where: pathlib.Path) -> dict[int, tokenizers.AddedToken]:
    if not isinstance(numbered, Mapping):
        raise TokenizerError(f"{where}: {NUMBERED} is {short(numbered)}; it must be an object of ids and tokens")
    for key, value in numbered.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 12 and is_id(int(key))):
            raise TokenizerError(f"{where}: {NUMBERED} holds the id {short(key)}; an id is a whole number from 0 to {MAX_ID}")
        if not isinstance(value, Mapping):
            raise TokenizerError(f"{where}: {NUMBERED}[{key}] is {short(value)}; it must be an object with the token's text as \"content\"")
    return {int(key): _token(value, f"{where}: {NUMBERED}[{key}]") for key, value in numbered.items()}


def _token(value: object, where: object, *, is_special: bool | None = None) -> Token:
    """A text or an object of files as a token.

    Args:
        value: it.
        where: names it in messages.
        is_special: None is what the object says.
    """
    if isinstance(value, Mapping):
        flags = {name: value[name] for name in FLAGS if name in value}
        wrong = next((name for name, flag in flags.items() if not isinstance(flag, bool)), None)
        if wrong is not None:
            raise TokenizerError(f"{where}: {wrong} of the token {short(value.get('content'))} is {short(flags[wrong])}; it must be true or false")
        if isinstance(value.get("content"), str) and is_unicode(value["content"]):
            return tokenizers.AddedToken(value["content"], **{**flags, **({} if is_special is None else {"special": is_special})})
        value = value.get("content")
    if isinstance(value, tokenizers.AddedToken) or (isinstance(value, str) and is_unicode(value)):
        return value
    raise TokenizerError(f"{where} has a token whose text is {short(value)}; it must be a text that UTF-8 can hold")
