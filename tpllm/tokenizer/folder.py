"""The files of a Hugging Face folder that say how text becomes token ids."""
import dataclasses
import json
import pathlib
from collections.abc import Mapping

import tokenizers

from tpllm.checkpoint.source import read_small
from tpllm.errors import CheckpointError, TokenizerError, short

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OLDER_EXTRAS, EXTRAS = "additional_special_tokens", "extra_special_tokens"
DEFAULT_TEMPLATE = "default"
MAX_ID = 2**31 - 1
"""Of a token: ids are 32-bit numbers on devices."""


@dataclasses.dataclass(frozen=True)
class TokenizerFolder:
    """What the folder's files hold; a file that is missing counts as empty.

    Attributes:
        path: the folder.
        settings: tokenizer_config.json and special_tokens_map.json. Where tokenizer_config.json lists its added tokens (``added_tokens_decoder``) it
            goes before the other, else the other before it, as in transformers. Special tokens without a name are ``extra_special_tokens``.
        config: config.json.
        generation_config: generation_config.json.
        templates: chat templates by name; the one without a name is ``"default"``.
        lists_added: whether tokenizer_config.json lists its added tokens.
        added_ids: added_tokens.json: texts and their ids, which count where it does not.
        own_names: names of special tokens beside the usual ones and those that end in ``_token``.
        special_texts: texts of added_tokens.json that are special tokens. Some that the other files call special are missing: transformers reads
            too late that they are.
        ignored_names: names that only special_tokens_map.json has, beside a tokenizer_config.json that lists the added tokens.
    """

    path: pathlib.Path
    settings: Mapping
    config: Mapping
    generation_config: Mapping
    templates: Mapping[str, str]
    lists_added: bool = False
    added_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
    own_names: tuple[str, ...] = ()
    special_texts: frozenset[str] = frozenset()
    ignored_names: frozenset[str] = frozenset()

    def flag(self, name: str) -> bool | None:
        """A setting that is true or false; None where it is absent or null.

        Raises:
            TokenizerError: another value.
        """
        value = self.settings.get(name)
        if value is not None and not isinstance(value, bool):
            raise TokenizerError(f"{self.path / 'tokenizer_config.json'}: {name} is {short(value)}; it must be true or false")
        return value

    def special_names(self) -> dict[str, str]:
        """Texts of the tokens that have a name (``bos_token``, ...), for chat templates and for ids."""
        own = [name for name in self.settings if isinstance(self.settings[name], str) and name.endswith("_token")]
        named = {name: _text_of(self.settings.get(name)) for name in (*SPECIAL_NAMES, *own, *self.own_names)}
        return {name: text for name, text in named.items() if text}

    def special_tokens(self) -> dict[str, tokenizers.AddedToken]:
        """Every token that tokenizer_config.json or special_tokens_map.json call special, by its text."""
        values = [*(self.settings[name] for name in self.special_names()), *(self.settings.get(EXTRAS) or [])]
        return {_text_of(value): self._added_token(value) for value in values if _text_of(value)}

    def numbered_tokens(self) -> dict[int, tokenizers.AddedToken]:
        """Tokens with the ids that ``added_tokens_decoder`` of tokenizer_config.json gives them, else added_tokens.json, by id in rising order.

        Raises:
            TokenizerError: an id or a token that is none.
        """
        if not self.lists_added:
            return {token_id: self._added_token({"content": text}, is_special=text in self.special_texts)
                    for text, token_id in sorted(self.added_ids.items(), key=lambda item: item[1])}
        numbered, where = self.settings["added_tokens_decoder"] or {}, f"{self.path / 'tokenizer_config.json'}: added_tokens_decoder"
        if not isinstance(numbered, Mapping):
            raise TokenizerError(f"{where} is {short(numbered)}; it must be an object of ids and tokens")
        found = {}
        for key, value in numbered.items():
            if not (key.isascii() and key.isdecimal() and len(key) < 12 and int(key) <= MAX_ID):
                raise TokenizerError(f"{where} holds the id {short(key)}; an id is a whole number from 0 to {MAX_ID}")
            if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
                raise TokenizerError(f"{where}[{key}] is {short(value)}; it must be an object with the token's text as \"content\"")
            found[int(key)] = self._added_token(value, is_special=value.get("special") is True)
        return dict(sorted(found.items()))

    def configured_ids(self, name: str) -> list[int]:
        """Ids that config.json and generation_config.json give under a name such as ``bos_token_id``: an int, a list, or nothing."""
        files = {"config.json": self.config, "generation_config.json": self.generation_config}
        return [token_id for file, values in files.items() for token_id in token_ids(self.path / file, values, name)]

    def _added_token(self, value: object, *, is_special: bool = True) -> tokenizers.AddedToken:
        flags, text = value if isinstance(value, Mapping) else {}, _text_of(value) or ""
        kept = {"normalized": not is_special, **{name: flags[name] for name in ("lstrip", "rstrip", "single_word", "normalized") if name in flags}}
        wrong = next((name for name, flag in kept.items() if not isinstance(flag, bool)), None)
        if wrong is not None:
            raise TokenizerError(f"{self.path / 'tokenizer_config.json'}: {wrong} of the token {short(text)} is {short(kept[wrong])}; "
                                 "it must be true or false")
        return tokenizers.AddedToken(self._checked_text(text), special=is_special, **kept)

    def _checked_text(self, text: str) -> str:
        if not is_unicode(text):
            raise TokenizerError(f"{self.path / 'tokenizer_config.json'}: the token {short(text)} holds half of a surrogate pair; correct that entry")
        return text


def read_folder(path: pathlib.Path) -> TokenizerFolder:
    """Read what stands beside tokenizer.json.

    Raises:
        TokenizerError: there is no tokenizer.json, or a file is not what its name says; the message says what to do.
    """
    if not (path / "tokenizer.json").is_file():
        raise TokenizerError(_what_to_do_without(path))
    own, mapped = read_object(path, "tokenizer_config.json"), read_object(path, "special_tokens_map.json")
    has_list = "added_tokens_decoder" in own
    added_ids = {} if has_list else read_object(path, "added_tokens.json")
    for text, token_id in added_ids.items():
        if not text or not _is_id(token_id):
            raise TokenizerError(f"{path / 'added_tokens.json'}: the id of {short(text)} is {short(token_id)}; it must map texts to ids "
                                 f"from 0 to {MAX_ID}")
    named, listed, is_late = _extras(path, own, {} if has_list else mapped)
    settings = {**({**mapped, **own} if has_list else {**own, **mapped}), **named, EXTRAS: listed}
    settings = {name: value for name, value in settings.items() if name != EXTRAS or value}
    early = [settings.get(name) for name in SPECIAL_NAMES if name in mapped or not isinstance(own.get(name), Mapping)]
    return TokenizerFolder(path=path, settings=settings, config=read_object(path, "config.json"),
                           generation_config=read_object(path, "generation_config.json"), templates=_read_templates(path, own.get("chat_template")),
                           lists_added=has_list, added_ids=added_ids, own_names=tuple(named),
                           special_texts=frozenset(map(_text_of, early if is_late else [*early, *listed])),
                           ignored_names=frozenset(mapped.keys() - own.keys()) if has_list else frozenset())


def _extras(path: pathlib.Path, own: Mapping, mapped: Mapping) -> tuple[dict, list, bool]:
    """Special tokens beside those of fixed names: (with names of their own, a list, whether it was found last).

    Both files may have each under two keys and in two forms, of which transformers takes the first of tokenizer_config.json's and the other file's
    newer key, else what is left.
    """
    first = own.get(EXTRAS) or own.get(OLDER_EXTRAS) or (own[EXTRAS] if EXTRAS in own else None)
    rest = mapped.get(OLDER_EXTRAS) or (own.get(OLDER_EXTRAS) if own.get(EXTRAS) else None)
    named: dict = {}
    listed: list | None = None
    for many in (first, mapped.get(EXTRAS)):
        if isinstance(many, Mapping):
            named |= many
        elif isinstance(many, list):
            listed = [*(listed or []), *many]
        elif many is not None:
            raise TokenizerError(f"{path / 'tokenizer_config.json'}: {EXTRAS} is {short(many)}; it must be a list of tokens")
    if listed is not None:
        return named, listed, False
    return named, rest if isinstance(rest, list) else [], True


def read_object(folder: pathlib.Path, name: str) -> dict:
    """A JSON object of the folder; empty where there is no such file.

    Raises:
        TokenizerError: a link out of the folder, or no JSON object.
    """
    text = read_text(folder, name)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{folder / name} is not JSON ({short(str(error))}); fetch the file again") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{folder / name} holds a {type(value).__name__}; it must hold a JSON object")
    return value


def read_text(folder: pathlib.Path, name: str) -> str | None:
    """A file of the folder as text; None where there is none.

    Raises:
        TokenizerError: a link out of the folder, no regular file, over 100 MB, or not UTF-8.
    """
    if not (folder / name).exists() and not (folder / name).is_symlink():
        return None
    try:
        return read_small(folder, name).decode("utf-8")
    except CheckpointError as error:
        raise TokenizerError(str(error)) from None
    except (UnicodeDecodeError, OSError) as error:
        raise TokenizerError(f"{folder / name} cannot be read ({error}); fetch the file again") from None


def token_ids(path: pathlib.Path, values: Mapping, name: str) -> list[int]:
    """The ids that a file's values give under a name: an int, a list, or nothing. Negative ones, which mean none, are left out.

    Raises:
        TokenizerError: no ids, or one that no token can have.
    """
    value = values.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) and token_id <= MAX_ID for token_id in ids):
        raise TokenizerError(f"{path}: {name} is {short(value)}; it must be a token id up to {MAX_ID}, or a list of them")
    return [token_id for token_id in ids if token_id >= 0]


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold a text, which may have come from JSON's escapes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ID


def _what_to_do_without(path: pathlib.Path) -> str:
    if not path.is_dir():
        return f"{path} is not a folder; give a folder that holds tokenizer.json"
    for name, kind in (("tokenizer.model", "SentencePiece"), ("vocab.json", "slow"), ("tekken.json", "Tekken")):
        if (path / name).is_file():
            return (f"{path} has no tokenizer.json, only a {kind} tokenizer ({name}); convert it once with transformers: "
                    f"AutoTokenizer.from_pretrained({str(path)!r}, use_fast=True).save_pretrained({str(path)!r})")
    return (f"{path} has no tokenizer.json; copy it from the model's repository, or save the model's tokenizer there with transformers, "
            "or give token ids only and skip_tokenizer_init=True")


def _read_templates(path: pathlib.Path, from_settings: object) -> dict[str, str]:
    """Templates by name. Of the same name counts, as in transformers: additional_chat_templates, chat_template.jinja, which replaces all of
    tokenizer_config.json's, tokenizer_config.json, and chat_template.json where there is none of these."""
    own = from_settings
    if isinstance(own, list):
        own = {entry.get("name"): entry.get("template") for entry in own if isinstance(entry, Mapping)}
    elif own is not None and not isinstance(own, Mapping):
        own = {DEFAULT_TEMPLATE: own}
    in_jinja = read_text(path, "chat_template.jinja")
    if in_jinja is not None:
        own = {DEFAULT_TEMPLATE: in_jinja}
    elif own is None:
        in_json = read_object(path, "chat_template.json").get("chat_template")
        own = in_json if isinstance(in_json, Mapping) else {} if in_json is None else {DEFAULT_TEMPLATE: in_json}
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in own.items()):
        raise TokenizerError(f"{path / 'tokenizer_config.json'}: chat_template must be a text or a list of {{name, template}}; correct that entry")
    folder = path / "additional_chat_templates"
    names = sorted(file.name for file in folder.glob("*.jinja")) if folder.is_dir() else []
    return {**own, **{name.removesuffix(".jinja"): read_text(path, f"{folder.name}/{name}") for name in names}}


def _text_of(value: object) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None
