"""The files of a Hugging Face folder that say how text becomes token ids."""
import dataclasses
import json
import pathlib
from collections.abc import Mapping

import tokenizers

from tpllm.checkpoint.reads import read_noted_text
from tpllm.errors import CheckpointError, TokenizerError

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")
DEFAULT_TEMPLATE = "default"
SAMPLING_KEYS = {"repetition_penalty": "repetition_penalty", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
                 "max_new_tokens": "max_tokens"}


@dataclasses.dataclass(frozen=True)
class TokenizerFolder:
    """What the folder's files hold; a file that is missing counts as empty.

    Attributes:
        path: the folder.
        settings: tokenizer_config.json over special_tokens_map.json.
        config: config.json.
        generation_config: generation_config.json.
        templates: chat templates by name; the one without a name is ``"default"``.
    """

    path: pathlib.Path
    settings: Mapping
    config: Mapping
    generation_config: Mapping
    templates: Mapping[str, str]

    def special_names(self) -> dict[str, str]:
        """Texts of the tokens that have a name (``bos_token``, ...), for chat templates and for ids."""
        named = {name: _text_of(self.settings.get(name)) for name in SPECIAL_NAMES}
        for key in SPECIAL_LISTS:
            if isinstance(self.settings.get(key), Mapping):
                named |= {name: _text_of(value) for name, value in self.settings[key].items()}
        return {name: text for name, text in named.items() if text}

    def special_tokens(self) -> dict[str, tokenizers.AddedToken]:
        """Every token that tokenizer_config.json or special_tokens_map.json call special, by its text."""
        values = [self.settings.get(name) for name in SPECIAL_NAMES]
        for key in SPECIAL_LISTS:
            many = self.settings.get(key) or []
            values += many.values() if isinstance(many, Mapping) else many
        return {_text_of(value): _added_token(value) for value in values if _text_of(value)}

    def numbered_tokens(self) -> dict[int, tokenizers.AddedToken]:
        """``added_tokens_decoder`` of tokenizer_config.json, by id in rising order."""
        numbered = self.settings.get("added_tokens_decoder") or {}
        return {int(key): _added_token(value, is_special=bool(value.get("special")))
                for key, value in sorted(numbered.items(), key=lambda item: int(item[0]))}

    def configured_ids(self, name: str) -> list[int]:
        """Ids that config.json and generation_config.json give under a name such as ``eos_token_id``: an int, a list, or nothing."""
        found = []
        for file_name, values in (("config.json", self.config), ("generation_config.json", self.generation_config)):
            value = values.get(name)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
                raise TokenizerError(f"{self.path / file_name}: {name} is {value!r}; it must be a token id or a list of them")
            found += [token_id for token_id in ids if token_id >= 0]
        return found

    def default_sampling(self) -> dict:
        """Sampling values that generation_config.json sets, under the names of ``SamplingParams``.

        The rule is vLLM's: only these keys are read, an absent or null key keeps the default, and ``do_sample`` is not read, so that
        ``do_sample: false`` does not make sampling greedy (in transformers it does).
        """
        return {ours: self.generation_config[theirs] for theirs, ours in SAMPLING_KEYS.items() if self.generation_config.get(theirs) is not None}


def read_folder(path: pathlib.Path) -> TokenizerFolder:
    """Read what stands beside tokenizer.json.

    Raises:
        TokenizerError: there is no tokenizer.json, or a file is not what its name says; the message says what to do.
    """
    if not (path / "tokenizer.json").is_file():
        raise TokenizerError(_what_to_do_without(path))
    tokenizer_config = _read_json(path / "tokenizer_config.json")
    return TokenizerFolder(path=path, settings={**_read_json(path / "special_tokens_map.json"), **tokenizer_config},
                           config=_read_json(path / "config.json"), generation_config=_read_json(path / "generation_config.json"),
                           templates=_read_templates(path, tokenizer_config.get("chat_template")))


def _what_to_do_without(path: pathlib.Path) -> str:
    if not path.is_dir():
        return f"{path} is not a folder; give a folder that holds tokenizer.json"
    for name, kind in (("tokenizer.model", "SentencePiece"), ("vocab.json", "slow"), ("tekken.json", "Tekken")):
        if (path / name).is_file():
            return (f"{path} has no tokenizer.json, only a {kind} tokenizer ({name}); convert it once with transformers: "
                    f"AutoTokenizer.from_pretrained({str(path)!r}, use_fast=True).save_pretrained({str(path)!r})")
    return f"{path} has no tokenizer.json; copy it from the model's repository, or save the model's tokenizer there with transformers"


def _read_json(path: pathlib.Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_noted_text(path))
    except CheckpointError:
        raise
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a {type(value).__name__}; it must hold a JSON object")
    return value


def _read_templates(path: pathlib.Path, from_settings: object) -> dict[str, str]:
    """Templates by name; a file of its own goes before tokenizer_config.json, as in transformers."""
    found = {}
    if isinstance(from_settings, str):
        found[DEFAULT_TEMPLATE] = from_settings
    elif isinstance(from_settings, list):
        found |= {entry.get("name"): entry.get("template") for entry in from_settings if isinstance(entry, Mapping)}
    in_json = _read_json(path / "chat_template.json").get("chat_template")
    if isinstance(in_json, str):
        found[DEFAULT_TEMPLATE] = in_json
    files = sorted((path / "additional_chat_templates").glob("*.jinja"))
    named = {file.stem: file for file in files} | {DEFAULT_TEMPLATE: path / "chat_template.jinja"}
    found |= {name: read_noted_text(file) for name, file in named.items() if file.is_file()}
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in found.items()):
        raise TokenizerError(f"{path / 'tokenizer_config.json'}: chat_template must be a text or a list of {{name, template}}; correct that entry")
    return found


def _text_of(value: object) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _added_token(value: object, *, is_special: bool = True) -> tokenizers.AddedToken:
    flags = value if isinstance(value, Mapping) else {}
    kept = {name: bool(flags.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
    return tokenizers.AddedToken(_text_of(value) or "", normalized=bool(flags.get("normalized", not is_special)), special=is_special, **kept)
