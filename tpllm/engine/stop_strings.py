"""Stop strings, found in text that grows token by token."""


class StopStrings:
    """The strings that end a completion.

    Which one ends it does not depend on how the text is cut into tokens: it is the one whose last character comes first, and of several
    that end together the longest.

    Args:
        stops: strings, none empty.
        is_included: whether the text keeps the string that ended it.
    """

    def __init__(self, stops: tuple[str, ...], *, is_included: bool):
        self._stops, self._is_included = stops, is_included
        self._longest = max(map(len, stops), default=0)

    def find(self, text: str, num_checked: int) -> tuple[int, str] | None:
        """Look for a stop string that ends in the new part of a text.

        Args:
            text: all of it.
            num_checked: how many of its first characters are old; a string that ends in them does not count.

        Returns:
            (the length to cut the text to, the string), or None.
        """
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop, max(0, num_checked - len(stop) + 1))) >= 0]
        if not found:
            return None
        end, at, stop = min(found)
        return (end if self._is_included else at), stop

    def num_certain(self, text: str) -> int:
        """How many characters of an unfinished text no stop string can take back."""
        return len(text) if self._is_included or not self._stops else max(0, len(text) - self._longest + 1)
