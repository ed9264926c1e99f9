"""How a job writes JSON, one object on one line of UTF-8, and what it reads of it."""
import json
from typing import Any


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
