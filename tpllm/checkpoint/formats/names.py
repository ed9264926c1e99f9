"""The patterns by which a quantization_config names modules."""
import re
import warnings
from collections.abc import Iterable

from tpllm.errors import CheckpointError

MAX_REPEATS = 5
"""The most repeats in one expression: with no repeated group, the time of a match grows with at most this power of a name's length."""
_REPEAT = re.compile(r"(?<!\\)[*+{]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_EMBEDDINGS = ("embed_tokens", "word_embeddings", "tok_embeddings", "wte", "wpe")


def compile_pattern(expression: str, where: str) -> re.Pattern:
    """A regular expression that a file brings, refused where a match could take unbounded time.

    Raises:
        CheckpointError: it is not valid, repeats a group, or has more than :data:`MAX_REPEATS` repeats.
    """
    if _REPEATED_GROUP.search(expression) or len(_REPEAT.findall(expression)) > MAX_REPEATS:
        raise CheckpointError(f"{where}: the expression {expression[:200]!r} repeats a group, or repeats more than {MAX_REPEATS} times: a match "
                              "could take forever; write it as a list of simpler ones")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an expression that a later Python will read otherwise
            return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{where}: {expression[:200]!r} is not a regular expression: {error}") from None


class ModuleNames:
    """A list of modules: by name, by ``re:`` and an expression that the name's beginning matches, or by class (``Linear``, ``Embedding``).

    Args:
        entries: as the file has them.
        where: they lie, for messages.
    """

    def __init__(self, entries: Iterable[str], where: str):
        self._exact = {entry for entry in entries if not entry.startswith("re:")}
        self._patterns = [compile_pattern(entry.removeprefix("re:"), where) for entry in entries if entry.startswith("re:")]

    def rank(self, module: str) -> int | None:
        """How a module of a matrix is named, the closest first: 0 by name, 1 by expression, 2 by class; None if it is not."""
        if module in self._exact:
            return 0
        if any(pattern.match(module) for pattern in self._patterns):
            return 1
        return 2 if class_name(module) in self._exact else None


def class_name(module: str) -> str:
    """What torch calls the class of a module that has a matrix: by its name, since a checkpoint says nothing of classes."""
    return "Embedding" if module.rpartition(".")[2] in _EMBEDDINGS else "Linear"
