"""What generation_config.json and config.json say of generating: the ids that end a text, and sampling values."""
import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Self

from tpllm.errors import TokenizerError, short
from tpllm.tokenizer.folder import read_object, token_ids

SAMPLING_KEYS = {"repetition_penalty": "repetition_penalty", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
                 "max_new_tokens": "max_tokens"}
WHOLE = ("top_k", "max_new_tokens")
MAX_ENDING_IDS = 1000


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """What a model's files say of generating.

    Attributes:
        eos_token_ids: ids that end a text.
        sampling: sampling values, named as in ``SamplingParams``.
    """

    eos_token_ids: frozenset[int] = frozenset()
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_folder(cls, path: pathlib.Path) -> Self:
        """The defaults of a Hugging Face folder, whose tokenizer is not read.

        Raises:
            TokenizerError: a file is damaged.
        """
        config, generation_config = read_object(path, "config.json"), read_object(path, "generation_config.json")
        return cls(ending_ids(path, config, generation_config), default_sampling(path, generation_config))


def ending_ids(path: pathlib.Path, config: Mapping, generation_config: Mapping) -> frozenset[int]:
    """Ids that end a text: generation_config.json's; config.json's only where that file has none. As in transformers, a stale id in config.json ends
    nothing.

    Args:
        path: the folder, for messages.
        config: config.json's values; ``text_config`` of a model with several parts is asked where they name none.
        generation_config: generation_config.json's values.

    Raises:
        TokenizerError: what stands there is no id, or none that a token can have.
    """
    text_config = config.get("text_config")
    files = [("generation_config.json", generation_config), ("config.json", config)]
    files += [("config.json", text_config)] if isinstance(text_config, Mapping) else []
    found = next((ids for file, values in files if (ids := token_ids(path / file, values, "eos_token_id"))), [])
    if len(set(found)) > MAX_ENDING_IDS:
        raise TokenizerError(f"{path}: its files name {len(set(found))} ids that end a text; at most {MAX_ENDING_IDS} are allowed")
    return frozenset(found)


def default_sampling(path: pathlib.Path, generation_config: Mapping) -> dict:
    """Sampling values that generation_config.json sets, under the names of ``SamplingParams``.

    The rule is vLLM's: only these keys are read, an absent or null key keeps the default, and ``do_sample`` is not read, so that
    ``do_sample: false`` does not make sampling greedy (in transformers it does).

    Raises:
        TokenizerError: a value that is no number.
    """
    return {ours: _number(path, theirs, generation_config[theirs]) for theirs, ours in SAMPLING_KEYS.items()
            if generation_config.get(theirs) is not None}


def _number(path: pathlib.Path, name: str, value: object) -> int | float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and (isinstance(value, int) or math.isfinite(value))
    if not is_number or (name in WHOLE and value != int(value)):
        raise TokenizerError(f"{path / 'generation_config.json'}: {name} is {short(value)}; it must be a {'whole ' if name in WHOLE else ''}number")
    return int(value) if name in WHOLE else value
