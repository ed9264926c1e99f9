"""What users are told: errors, each a ``ValueError`` whose message names the value, the limit and the fix; the log; and how values stand in both."""
import logging
from collections.abc import Iterable

log = logging.getLogger("tpllm")


class TpllmError(ValueError):
    """Base of every error that a user's input can cause."""


class VersionError(TpllmError, ImportError):
    """A Python or a jax that tpllm was not tried on."""


class ConfigError(TpllmError):
    """A model configuration that cannot be run."""


class CheckpointError(TpllmError):
    """A checkpoint that is missing, damaged, unsafe or of the wrong shape."""


class MemoryNeedError(TpllmError):
    """A model that does not fit the memory that is free."""


class TokenizerError(TpllmError):
    """A tokenizer or chat template that is missing or cannot be used."""


class SamplingError(TpllmError):
    """A sampling parameter out of its range."""


class PromptError(TpllmError):
    """A prompt that is empty, malformed or longer than the context."""


class JobError(TpllmError):
    """A batch job that cannot be started or resumed."""


MAX_SHOWN = 200
"""Characters of a value in a message."""


def short(value: object, *, most: int = MAX_SHOWN) -> str:
    """``repr`` of something from a user or a file, which may be of any size and depth, in ``most`` characters of one line."""
    if isinstance(value, str | bytes | tuple | list) and len(value) > most:
        value = value[:most]
    try:
        text = " ".join(repr(value).split("\n"))  # of an array in lines
    except (RecursionError, ValueError):  # nested too deeply, or a number of more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."


def did_you_mean(word: str, known: Iterable[str], form: str = "{}") -> str:
    """``"did you mean 'int4'? "``, with the known word that is nearest to ``word``, in that form; empty where none is near."""
    import difflib  # an error is rare, and the command line has to begin at once
    near = difflib.get_close_matches(word, list(known), 1)
    return f"did you mean {form.format(near[0])!r}? " if near else ""
