"""Arguments under other projects' names: each becomes one of ours, is taken without effect, or is refused with what to use instead.

The tables of names are data: :mod:`tpllm.names.vllm` and :mod:`tpllm.names.others`.
"""
import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from tpllm.errors import TpllmError, did_you_mean, log, short
from tpllm.names.others import OTHERS


@dataclasses.dataclass(frozen=True)
class Same:
    """A name that works here as it is; ``note`` says where its meaning differs."""

    note: str = ""


@dataclasses.dataclass(frozen=True)
class Renamed:
    """A name whose value goes to a parameter of ours.

    Attributes:
        ours: that parameter.
        note: how the meanings differ.
        kind: the annotation of its value.
        make: of all given arguments, our value; None where it is the same one. It raises ``ValueError`` for a value that cannot be.
    """

    ours: str
    note: str = ""
    kind: Any = inspect.Parameter.empty
    make: Callable[[Mapping[str, Any]], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Taken:
    """A name that changes no result here, whatever its value; ``why`` says so in the log."""

    why: str


@dataclasses.dataclass(frozen=True)
class Only:
    """A name of which only what is done anyway is taken: ``values``, or those for which ``values`` is true; ``use`` says what to do else."""

    values: Collection[Any] | Callable[[Any], bool]
    use: str


@dataclasses.dataclass(frozen=True)
class Refused:
    """A name of something that is not there; ``use`` says what to do instead. None, False and what is empty ask for nothing."""

    use: str


Meaning = Same | Renamed | Taken | Only | Refused
Table = Mapping[str, Meaning]


def takes(table: Table, *, error: type[TpllmError]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: the function also takes the names of a table, and an unknown argument is an ``error`` that names the nearest one."""
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        parameters = {name: one for name, one in signature.parameters.items() if name != "self"}
        is_keyword_only = all(one.kind is one.KEYWORD_ONLY for one in parameters.values())

        @functools.wraps(function)
        def call(self, *args: Any, **given: Any) -> Any:
            if args and is_keyword_only:
                raise error(f"{type(self).__name__} is given {short(args[0])} without a name; name every value, as in {next(iter(parameters))}=...")
            if given.keys() <= parameters.keys():
                return function(self, *args, **given)
            ours = translated(given, known={name: one.default for name, one in parameters.items()}, table=table, error=error)
            try:
                return function(self, *args, **ours)
            except TpllmError as wrong:  # it knows our names only
                renamed = [f"{name} is {table[name].ours} here" for name in given if isinstance(table.get(name), Renamed)]
                wrong.args = (f"{wrong} ({', '.join(renamed)})",) if renamed else wrong.args
                raise
        more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=one.kind)
                for name, one in table.items() if isinstance(one, Renamed) and name not in parameters]
        call.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *more])
        return call
    return decorate


def translated(given: Mapping[str, Any], *, known: Mapping[str, Any], table: Table, error: type[TpllmError]) -> dict[str, Any]:
    """Given arguments under our names.

    Args:
        given: by name.
        known: our names with their defaults.
        table: further names.
        error: what is raised for a name that is not known or not served, and for two that say different things.
    """
    ours = {name: value for name, value in given.items() if name in known}
    for name, value in given.items():
        if name in known or (value is None and name in table):
            continue
        meaning = table.get(name)
        if meaning is None or isinstance(meaning, Same):
            names = [*known, *(name for name, one in table.items() if not isinstance(one, Refused))]
            raise error(f"there is no argument {name!r}; {_hint(name, names)}".rstrip("; "))
        if not isinstance(meaning, Renamed):
            _take(name, value, meaning, error)
            continue
        try:
            made = value if meaning.make is None else meaning.make(given)
        except ValueError as wrong:
            raise error(str(wrong)) from None
        if ours.get(meaning.ours, known.get(meaning.ours)) not in (known.get(meaning.ours), made):
            raise error(f"{name} is {short(value)} and {meaning.ours} is {short(ours[meaning.ours])}, which say the same thing; give one of them")
        ours[meaning.ours] = made
    return ours


def missing(name: str, *, of: str, known: Collection[str], table: Table) -> str:
    """The message of an ``AttributeError``: ``of`` has no attribute ``name``, and what to use."""
    meaning = table.get(name)
    hint = meaning.use if isinstance(meaning, Refused) else _hint(name, known)
    return f"{of} has no attribute {name!r}; {hint}".rstrip("; ")


def whole(name: str, value: Any, *, least: int = 1) -> int:
    """A whole number.

    Raises:
        ValueError: it is none, or below the least.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {short(value)}; it must be a whole number of at least {least}")
    return value


def _take(name: str, value: Any, meaning: Taken | Only | Refused, error: type[TpllmError]) -> None:
    if isinstance(meaning, Taken):
        log.info("%s=%s has no effect: %s", name, short(value, most=50), meaning.why)
        return
    if isinstance(meaning, Refused):
        is_taken = value is False or (hasattr(value, "__len__") and not len(value))
    else:
        is_taken = meaning.values(value) if callable(meaning.values) else value in meaning.values
    if not is_taken:
        raise error(f"{name} is {short(value)}, which is not supported; {meaning.use}")
    log.info("%s=%s is what is done anyway", name, short(value, most=50))


def _hint(name: str, known: Collection[str]) -> str:
    """What to write for an unknown name: another project's has its counterpart, and others their nearest."""
    for project, names in OTHERS.items():
        if name in names:
            return f"{project} calls so what is here {names[name]}"
    return did_you_mean(name, known).strip()
