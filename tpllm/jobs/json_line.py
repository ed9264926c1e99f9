"""How a job writes JSON, one object on one line of UTF-8, and what it reads of it."""
import json
import math
from typing import Any

REQUEST_KEYS = ("messages", "template_kwargs", "sampling", "body")
"""What a request is made of that is no text: in a table's columns it may stand as JSON text."""


def to_line(record: Any) -> bytes:
    """JSON in UTF-8 on one line; escaped to ASCII where it holds half of a surrogate pair."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(record, allow_nan=False).encode("ascii")


def is_deeper(value: object, depth: int) -> bool:
    """Whether there are more than ``depth`` lists and objects in each other. What reads such a value calls itself for each level."""
    level = [value]
    for _ in range(depth + 1):
        level = [item for inner in level if isinstance(inner, dict | list) for item in (inner.values() if isinstance(inner, dict) else inner)]
        if not level:
            return False
    return True


def parsed_or_text(text: str) -> Any:
    """What a text holds as JSON; the text itself where it is none."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return text


def _refuse(name: str) -> None:
    raise ValueError(name)


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(text)
    return value
