"""How a job writes JSON: one object on one line of UTF-8."""
import json
from typing import Any


def to_line(record: Any) -> bytes:
    """JSON in UTF-8 on one line; escaped to ASCII where it holds half of a surrogate pair."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(record, allow_nan=False).encode("ascii")
