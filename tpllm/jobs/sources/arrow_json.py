"""Converts Arrow to JSON: what each column type becomes in a request, an output line or an errors file.

Timestamps, dates, times and durations become ISO 8601 text (a timestamp with a time zone in UTC, with ``Z``), decimals their digits, binary base64,
NaN and infinities null, UUIDs their text; structs objects; maps with text or whole numbers as keys objects, other maps lists of pairs.
"""
import base64
import decimal
import functools
import math
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import types

from tpllm.errors import JobError
from tpllm.jobs.json_line import REQUEST_KEYS, parsed_or_text

LISTS = ((types.is_list, pa.list_), (types.is_large_list, pa.large_list), (types.is_list_view, pa.list_view),
         (types.is_large_list_view, pa.large_list_view))
DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}


def json_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of a batch as JSON objects.

    Raises:
        JobError: a column of a type that has no form in JSON.
    """
    columns = [json_values(name, column) for name, column in zip(batch.schema.names, batch.columns, strict=True)]
    return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def json_values(name: str, column: pa.Array) -> list[Any]:
    """The values of a column as JSON has them; see the module.

    Raises:
        JobError: a type that has no form in JSON.
    """
    plain = plain_type(column.type)
    try:
        values = (column if plain == column.type else column.cast(plain)).to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise JobError(f"column {name!r} is {column.type}, which has no form in JSON: {error}; leave it out of the input") from None
    convert = _converter(column.type)
    if convert is not None:
        values = [None if value is None else convert(value) for value in values]
    if name not in REQUEST_KEYS:
        return values
    # Nulls inside structs are keys not given, for a struct has all its fields in every row.
    return [parsed_or_text(value) if isinstance(value, str) else _without_nulls(value) for value in values]


@functools.cache
def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type to cast to so that Arrow gives plain Python values without loss: times become their counts, nested ones too."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if types.is_timestamp(kind) or types.is_date64(kind) or types.is_time64(kind) or types.is_duration(kind):
        return pa.int64()
    if types.is_date32(kind) or types.is_time32(kind):
        return pa.int32()
    if types.is_float16(kind):
        return pa.float32()
    if types.is_struct(kind):
        return pa.struct([field.with_type(plain_type(field.type)) for field in kind])
    if types.is_map(kind):
        return pa.map_(plain_type(kind.key_type), plain_type(kind.item_type))
    if types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(plain_type(kind.value_type)), kind.list_size)
    make = next((make for is_kind, make in LISTS if is_kind(kind)), None)
    return make(kind.value_field.with_type(plain_type(kind.value_type))) if make else kind


@functools.cache
def _converter(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What makes JSON of a value that is not null, as the plain type gives it; None where it is JSON already."""
    if isinstance(kind, pa.BaseExtensionType):
        return (lambda value: str(uuid.UUID(bytes=value))) if kind.extension_name == "arrow.uuid" else _converter(kind.storage_type)
    if types.is_dictionary(kind):
        return _converter(kind.value_type)
    if types.is_floating(kind):
        return lambda value: value if math.isfinite(value) else None
    if types.is_decimal(kind):
        return lambda value: format(value, "f")
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind) or types.is_binary_view(kind):
        return lambda value: base64.b64encode(value).decode("ascii")
    if types.is_temporal(kind):
        return _temporal(kind)
    if types.is_struct(kind):
        inner = [(field.name, _converter(field.type)) for field in kind]
        return _struct(inner) if any(convert for _, convert in inner) else None
    if types.is_map(kind):
        return _map(kind)
    if types.is_fixed_size_list(kind) or any(is_kind(kind) for is_kind, _ in LISTS):
        convert = _converter(kind.value_type)
        return convert and (lambda values: [None if value is None else convert(value) for value in values])
    return None


def _temporal(kind: pa.DataType) -> Callable[[int], str]:
    if types.is_date(kind):
        return lambda count: str(np.datetime64(count, "D" if types.is_date32(kind) else "ms").astype("datetime64[D]"))
    unit = kind.unit
    if types.is_duration(kind):
        return lambda count: f"PT{decimal.Decimal(count).scaleb(-DIGITS[unit]):f}S"
    if types.is_time(kind):
        return lambda count: str(np.datetime64(count, unit)).partition("T")[2]
    zone = "Z" if kind.tz else ""
    return lambda count: str(np.datetime64(count, unit)) + zone


def _struct(inner: list[tuple[str, Callable[[Any], Any] | None]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda value: {name: item if item is None or convert is None else convert(item)
                          for (name, convert), item in zip(inner, value.values(), strict=True)}


def _map(kind: pa.MapType) -> Callable[[list[tuple[Any, Any]]], Any]:
    convert_key, convert = _converter(kind.key_type), _converter(kind.item_type)
    key_type = plain_type(kind.key_type)
    is_object = convert_key is None and (types.is_integer(key_type) or types.is_string(key_type) or types.is_large_string(key_type))

    def pairs(entries: list[tuple[Any, Any]]) -> Any:
        items = [(key if convert_key is None else convert_key(key), item if item is None or convert is None else convert(item))
                 for key, item in entries]
        return {str(key): item for key, item in items} if is_object else [list(item) for item in items]
    return pairs


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
