"""Reading a model's numbers from GGUF metadata, each checked (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "LLM")."""
from typing import Any

import numpy as np

from tpllm.checkpoint.gguf.header import GgufFile
from tpllm.errors import CheckpointError, short

MAX_COUNT, MAX_NUMBER = 2**31, float(np.finfo(np.float32).max)


def count(gguf: GgufFile, key: str, default: int | None = None) -> int | None:
    """A whole number of at least 1 and below 2**31, under the architecture's prefix.

    Raises:
        CheckpointError: another value, or none and no default.
    """
    value = gguf.metadata.get(f"{gguf.arch}.{key}")
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < MAX_COUNT:
        raise _refused(gguf, key, value, f"a whole number of 1 to {MAX_COUNT - 1}")
    return value


def count_or_none(gguf: GgufFile, key: str, default: int | None = None) -> int | None:
    """As :func:`count`, of a key whose 0 means that there is none, as llama.cpp reads windows, experts and contexts."""
    return None if is_zero(gguf.metadata.get(f"{gguf.arch}.{key}")) else count(gguf, key, default)


def is_zero(value: Any) -> bool:
    """Whether a value is a 0, or an array of one for each layer."""
    return isinstance(value, int | np.ndarray) and not isinstance(value, bool) and not np.any(value)


def needed(gguf: GgufFile, value: Any, key: str) -> Any:
    """What was read of a key that must be there."""
    if value is None:
        raise CheckpointError(f"{gguf.path}: {gguf.arch}.{key} is missing; the file does not describe a decoder. Convert the model again")
    return value


def needed_count(gguf: GgufFile, key: str) -> int:
    """As :func:`count`, of a key that must be there."""
    return needed(gguf, count(gguf, key), key)


def number(gguf: GgufFile, key: str, default: float | None = None) -> float | None:
    """A finite number of at least 0 under the architecture's prefix, without the digits that float32 does not hold."""
    value = gguf.metadata.get(f"{gguf.arch}.{key}")
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_NUMBER:
        raise _refused(gguf, key, value, "a finite number of at least 0")
    return float(str(np.float32(value)))


def number_or_none(gguf: GgufFile, key: str, default: float | None = None) -> float | None:
    """As :func:`number`, of a key whose 0 means that there is none."""
    return number(gguf, key, default) or None


def count_of_layer(gguf: GgufFile, key: str, layer: int) -> int | None:
    """A count that is one for all layers, or an array of one for each."""
    value: Any = gguf.metadata.get(f"{gguf.arch}.{key}")
    if not isinstance(value, np.ndarray):
        return count(gguf, key)
    if value.dtype.kind not in "iu" or not 0 <= layer < len(value) or not 0 < value[layer] < MAX_COUNT:
        raise _refused(gguf, key, value, f"whole numbers of 1 to {MAX_COUNT - 1}, one for each layer")
    return int(value[layer])


def heads_of_layer(gguf: GgufFile, key: str, layer: int) -> int:
    """Heads by ``attention.head_count`` or ``attention.head_count_kv``, which is the former where it is missing."""
    found = count_of_layer(gguf, key, layer) or count_of_layer(gguf, "attention.head_count", layer)
    return found or needed_count(gguf, "attention.head_count")


def same_in_every_layer(gguf: GgufFile, key: str) -> int | None:
    """A count that all layers share; None where it is missing.

    Raises:
        CheckpointError: layers that differ.
    """
    value = gguf.metadata.get(f"{gguf.arch}.{key}")
    if isinstance(value, np.ndarray) and (not len(value) or (value != value[0]).any()):
        raise _refused(gguf, key, value, "the same in every layer; models whose layers differ are not supported")
    return count_of_layer(gguf, key, 0)


def _refused(gguf: GgufFile, key: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(f"{gguf.path}: {gguf.arch}.{key} is {short(value)}; it must be {wanted}. Convert the model again")
