"""Reading a quantization_config: every field is checked for what it must be, since nothing in a file is trusted."""
from collections.abc import Mapping, Sequence
from typing import Any

from tpllm.errors import CheckpointError, short
from tpllm.families.fields import whole


class Settings:
    """A table of a JSON file. Fields are missing where they are null.

    Args:
        values: the table.
        where: it lies, for messages.

    Raises:
        CheckpointError: of every method too: a value that is not what is asked for; it names the field, its value and what it must be.
    """

    def __init__(self, values: Any, where: str):
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise CheckpointError(f"{where} is {short(values)}; it must be a JSON object")
        self.values, self.where = values, where

    def __contains__(self, key: str) -> bool:
        """Whether a field is there and not null."""
        return self.values.get(key) is not None

    def error(self, key: str, wanted: str) -> CheckpointError:
        """What to raise for a field that is not what it must be."""
        return CheckpointError(f"{self.where}: {key} is {short(self.values.get(key))}; {wanted}")

    def integer(self, *keys: str, default: int | None = None) -> int:
        """A whole number, which may be written as 32.0, from the first of some fields that is there."""
        key = next((key for key in keys if key in self), keys[0])
        value = whole(self.values.get(key, default) if key in self else default)
        if type(value) is not int or abs(value) >= 2**31:
            raise self.error(key, "it must be a whole number")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """A boolean."""
        value = self.values[key] if key in self else default
        if not isinstance(value, bool):
            raise self.error(key, "it must be true or false")
        return value

    def text(self, key: str, *, default: str | None = None) -> str:
        """A string, in lower case."""
        value = self.values[key] if key in self else default
        if not isinstance(value, str):
            raise self.error(key, "it must be a string")
        return value.lower()

    def names(self, key: str) -> Sequence[str]:
        """A list of strings; empty where it is missing."""
        value = self.values[key] if key in self else []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.error(key, "it must be a list of names")
        return value

    def pair(self, key: str) -> tuple[int, int]:
        """Two positive whole numbers."""
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and 0 < size < 2**31 for size in value):
            raise self.error(key, "it must be two positive whole numbers, such as [128, 128]")
        return value[0], value[1]

    def table(self, key: str) -> "Settings":
        """A table in the table; empty where it is missing."""
        return Settings(self.values[key] if key in self else {}, f"{self.where}: {key}")

    def one_of(self, key: str, value: Any, allowed: Sequence[Any]) -> None:
        """Raise where the value read from a field is none of those that are known."""
        if value not in allowed:
            raise self.error(key, f"it must be one of {', '.join(map(str, allowed))}")
