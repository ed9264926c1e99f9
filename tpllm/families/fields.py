"""Numbers and flags of a config.json, each checked: a message names the key, its value and what it must be.

A whole float such as 32.0 counts as a whole number; text and booleans never count as numbers, nor numbers and text as booleans.
"""
import sys
from collections.abc import Mapping
from typing import Any

from tpllm.errors import ConfigError, short

LARGEST = 2**31 - 1
DIGITS = 500
"""The most digits of a number in a message."""


def positive(hf: Mapping[str, Any], name: str, *, largest: int = LARGEST) -> int:
    """A whole number from 1 to ``largest``."""
    value = whole(hf.get(name))
    if value is None:
        raise ConfigError(f"config.json: {name} is missing, or null; give it a number")
    if type(value) is not int or value < 1:
        raise _refused(name, value, "a whole number of at least 1")
    if value > largest:
        raise ConfigError(f"config.json: {name} is {short(value, most=DIGITS)}; it may be {largest} at most")
    return value


def optional_count(hf: Mapping[str, Any], name: str) -> int | None:
    """As :func:`positive`, or None where the field is null."""
    return None if hf.get(name) is None else positive(hf, name)


def count(hf: Mapping[str, Any], name: str) -> int:
    """A whole number of at least 0."""
    value = whole(hf.get(name))
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise _refused(name, value, "a whole number of at least 0")
    return value


def positive_number(fields: Mapping[str, Any], name: str) -> float:
    """A finite number above 0, from config.json or an object in it."""
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise _refused(name, value, "a number above 0")
    return float(value)


def optional_number(fields: Mapping[str, Any], name: str) -> float | None:
    """A finite number above 0, or None where the field is null or missing."""
    return None if fields.get(name) is None else positive_number(fields, name)


def flag(fields: Mapping[str, Any], name: str) -> bool:
    """True or false."""
    value = fields.get(name)
    if not isinstance(value, bool):
        raise _refused(name, value, "true or false")
    return value


def whole(value: Any) -> Any:
    """A float that is a whole number as that number; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refused(name: str, value: Any, wanted: str) -> ConfigError:
    hint = ", without quotes" if isinstance(value, str) else ""
    return ConfigError(f"config.json: {name} is {short(value, most=DIGITS)}; it must be {wanted}{hint}")
