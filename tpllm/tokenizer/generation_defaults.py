"""What generation_config.json and config.json say of generating: the ids that end a text, and sampling values."""
import math
import pathlib
from collections.abc import Mapping

from tpllm.errors import TokenizerError, short
from tpllm.tokenizer.folder import token_ids

SAMPLING_KEYS = {"repetition_penalty": "repetition_penalty", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
                 "max_new_tokens": "max_tokens"}
WHOLE = ("top_k", "max_new_tokens")


def ending_ids(path: pathlib.Path, config: Mapping, generation_config: Mapping) -> list[int]:
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
    return (token_ids(path / "generation_config.json", generation_config, "eos_token_id") or token_ids(path / "config.json", config, "eos_token_id")
            or (token_ids(path / "config.json", text_config, "eos_token_id") if isinstance(text_config, Mapping) else []))


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
