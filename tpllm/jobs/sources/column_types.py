"""Which columns the rows of a JSONL input make as a table, and of which type, learnt from every row."""
import json

from tpllm.errors import JobError
from tpllm.jobs.sources.raw_row import RawRow

MAX_COLUMNS = 1000
EXACT_IN_DOUBLE = 2**53


class ColumnTypes:
    """The types of all keys seen so far.

    A column is ``null``, ``bool``, ``int64``, ``double`` or ``string`` where every value in it is that, or null, or absent; whole numbers among
    others that are not make a ``double`` as long as it holds them exactly. Anything else, lists and objects too, is ``json``: text.
    """

    def __init__(self):
        self._seen: dict[str, set[str]] = {}

    def add(self, row: RawRow) -> None:
        """Learn from one row; a row that is no JSON object teaches nothing.

        Raises:
            JobError: more columns than a table should have, or a name that it cannot have.
        """
        try:
            fields = json.loads(row.data)
        except (ValueError, RecursionError):
            return
        for key, value in fields.items() if isinstance(fields, dict) else ():
            if key not in self._seen:
                self._begin(key, row)
            self._seen[key].add(_kind(value))

    def result(self) -> dict[str, str]:
        """name -> type, in the order in which the names came up."""
        return {key: _common(kinds - {"null"}) for key, kinds in self._seen.items()}

    def _begin(self, key: str, row: RawRow) -> None:
        if not _is_text(key):
            raise JobError(f"{row}: the key {key!r} holds half of a surrogate pair, which no Parquet column can be called; "
                           "set output_format: jsonl")
        if len(self._seen) == MAX_COLUMNS:
            raise JobError(f"{row}: {key!r} is the input's column number {MAX_COLUMNS + 1}; a Parquet output has at most {MAX_COLUMNS}: "
                           "move keys that differ from row to row into one object, or set output_format: jsonl")
        self._seen[key] = set()


def _kind(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "bool"
    if isinstance(value, int):
        return "exact" if abs(value) <= EXACT_IN_DOUBLE else "int64" if -(2**63) <= value < 2**63 else "json"
    if isinstance(value, str):
        return "string" if _is_text(value) else "json"
    return "double" if isinstance(value, float) else "json"


def _common(kinds: set[str]) -> str:
    """The one type that holds all kinds."""
    if kinds <= {"exact", "int64"} and kinds:
        return "int64"
    if kinds <= {"exact", "double"} and kinds:
        return "double"
    return kinds.pop() if len(kinds) == 1 else "json" if kinds else "null"


def _is_text(value: str) -> bool:
    """Whether it has a UTF-8 form."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
