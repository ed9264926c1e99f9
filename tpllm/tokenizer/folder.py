"""The files of a Hugging Face folder that say how text becomes token ids."""
import dataclasses
import json
import pathlib
from collections.abc import Mapping

from tpllm.checkpoint.source import read_small
from tpllm.errors import CheckpointError, TokenizerError, short
from tpllm.tokenizer.token_files import NUMBERED, TokenFiles, collect_tokens

DEFAULT_TEMPLATE = "default"


@dataclasses.dataclass(frozen=True)
class TokenizerFolder:
    """What the folder's files hold; a file that is missing counts as empty.

    Attributes:
        path: the folder.
        settings: tokenizer_config.json.
        config: config.json.
        generation_config: generation_config.json.
        templates: chat templates by name; the one without a name is ``"default"``.
        tokens: those that these files and special_tokens_map.json and added_tokens.json name or number.
    """

    path: pathlib.Path
    settings: Mapping
    config: Mapping
    generation_config: Mapping
    templates: Mapping[str, str]
    tokens: TokenFiles = dataclasses.field(default_factory=TokenFiles)

    def flag(self, name: str) -> bool | None:
        """A setting that is true or false; None where it is absent or null.

        Raises:
            TokenizerError: another value.
        """
        value = self.settings.get(name)
        if value is not None and not isinstance(value, bool):
            raise TokenizerError(f"{self.path / 'tokenizer_config.json'}: {name} is {short(value)}; it must be true or false")
        return value

    def configured_ids(self, name: str) -> list[int]:
        """Ids that config.json and generation_config.json give under a name such as ``bos_token_id``: an int, a list, or nothing."""
        files = {"config.json": self.config, "generation_config.json": self.generation_config}
        return [token_id for file, values in files.items() for token_id in token_ids(self.path / file, values, name)]


def read_folder(path: pathlib.Path) -> TokenizerFolder:
    """Read what stands beside tokenizer.json.

    Raises:
        TokenizerError: there is no tokenizer.json, or a file is not what its name says; the message says what to do.
    """
    if not (path / "tokenizer.json").is_file():
        raise TokenizerError(_what_to_do_without(path))
    settings, mapped = read_object(path, "tokenizer_config.json"), read_object(path, "special_tokens_map.json")
    added_ids = {} if NUMBERED in settings else read_object(path, "added_tokens.json")
    return TokenizerFolder(path=path, settings=settings, config=read_object(path, "config.json"),
                           generation_config=read_object(path, "generation_config.json"),
                           templates=_read_templates(path, settings.get("chat_template")), tokens=collect_tokens(path, settings, mapped, added_ids))


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
    """The ids that a file's values give under a name: an int, a list, or nothing. Negative ones, which mean none, are left out; large ones are not:
    one beyond the vocabulary is never drawn.

    Raises:
        TokenizerError: no ids.
    """
    value = values.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise TokenizerError(f"{path}: {name} is {short(value)}; it must be a token id, or a list of them")
    return [token_id for token_id in ids if token_id >= 0]


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
        own = {name if isinstance(name := entry.get("name"), str) else None: entry.get("template") for entry in own if isinstance(entry, Mapping)}
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
