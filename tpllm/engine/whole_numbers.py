"""Whole numbers that are written as ``3.0`` or ``1e3``: so do languages with one kind of number, tables whose columns have gaps, and YAML's
exponents. They are the same numbers, and are taken as such where a whole number is asked for."""
import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from tpllm.engine.sampling_params import SamplingParams

SAMPLING_KINDS = {field.name: field.type for field in dataclasses.fields(SamplingParams)}


def whole(value: Any) -> Any:
    """The whole number that a float stands for; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def whole_sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of :class:`SamplingParams` with whole floats made whole where the field is; anything else, keys too, as it is."""
    return {key: as_kind(value, SAMPLING_KINDS.get(key)) for key, value in values.items()}


def as_kind(value: Any, kind: Any) -> Any:
    """A value with whole floats made whole where its type says so.

    Args:
        value: of JSON or YAML.
        kind: an annotation, such as ``int | None`` or ``Sequence[int]``; of others nothing is made.
    """
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if int in kinds and float not in kinds:
        value = whole(value)
    for inner in kinds:
        if get_origin(inner) is Sequence and isinstance(value, list | tuple):
            return [as_kind(item, get_args(inner)[0]) for item in value]
        if get_origin(inner) is Mapping and isinstance(value, Mapping):
            return {as_kind(key, get_args(inner)[0]): item for key, item in value.items()}
    return value
