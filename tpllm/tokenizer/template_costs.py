"""Bounds, before the call, of what one call of a chat template can make or take beyond the size of what it is given."""
import re
from collections.abc import Iterable

from tpllm.tokenizer.template_limits import MAX_ITEMS, Budget, TemplateLimitError

MAX_STEPS = 100_000_000
"""Comparisons of characters in one search from the right, which Python does letter by letter."""
MAX_STRIPPED = 1000
"""Characters that ``strip`` and ``trim`` look for: each of the text's is compared with each of them."""
MAX_COLLIDING = 2000
"""Keys other than texts in one mapping or set: anybody can choose numbers that all have one hash, and texts not."""
MAX_PLAIN_INT = 2**60
"""Up to here whole numbers have hashes of their own."""
MAX_PRECISION, MAX_TIME_FORMAT = 1000, 1000

SAFE_METHODS = {
    str: frozenset(("capitalize casefold center count endswith find format format_map index isalnum isalpha isascii isdecimal isdigit isidentifier "
                    "islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind "
                    "rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill").split()),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")), tuple: frozenset(("count", "index")), range: frozenset(("count", "index")),
    int: frozenset(("as_integer_ratio", "bit_count", "bit_length", "conjugate", "is_integer")),
    float: frozenset(("as_integer_ratio", "conjugate", "hex", "is_integer")),
}
"""Methods of Python's own types that a template may call. Those of texts are bounded below; the others take a time in proportion to their values."""
_CUTTING = ("rsplit", "split", "splitlines")
_FROM_RIGHT = ("rfind", "rindex", "rpartition", "rsplit")
_PADDING = ("center", "ljust", "rjust", "zfill")
_STRIPPING = ("lstrip", "rstrip", "strip")
_PERCENT_FIELD = re.compile(r"%(?:\([^()]*\))?[^A-Za-z%]*")
_BRACE_FIELD = re.compile(r"\{[^{}]*")
_HIDDEN_WIDTH = re.compile(r"%[-+ #0-9.]*\*|%\([^)]*\(")
_DIGITS = re.compile(r"\d+")


def is_safe_method(owner: object, name: str) -> bool:
    """Whether a template may call this method of a value."""
    kind = owner if isinstance(owner, type) else type(owner)
    names = next((names for base, names in SAFE_METHODS.items() if issubclass(kind, base)), None)
    return name in names if names is not None else kind.__module__ != "builtins"


def allow_method(budget: Budget, text: str, name: str, args: tuple, kwargs: dict) -> None:
    """Before a method of a text is called."""
    first = args[0] if args else kwargs.get("sep")
    if name in _PADDING and isinstance(first, int):
        budget.allow(first)
    elif name in _STRIPPING:
        allow_strip(first)
    elif name == "replace" and len(args) >= 2:
        allow_replace(budget, text, *args[:2])
    elif name in ("format", "format_map"):
        allow_braces(budget, text, [list(args), kwargs])
    elif name == "join" and args:
        allow_join(budget, text, args[0])
    elif name in _FROM_RIGHT:
        allow_search(text, first)
    if name in _CUTTING and len(text) > MAX_ITEMS:
        budget.allow_items(len(str.splitlines(text) if name == "splitlines" else str.split(text, first, *args[1:])))


def allow_product(budget: Budget, left: object, right: object) -> None:
    """Before ``left * right``."""
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            budget.allow((len(value) if isinstance(value, str) else budget.weigh(value)[0]) * max(times, 0))


def allow_power(budget: Budget, left: object, right: object) -> None:
    """Before ``left ** right``."""
    if isinstance(left, int) and isinstance(right, int) and abs(left) > 1:
        budget.allow_bits(abs(right) * left.bit_length())


def allow_percent(budget: Budget, text: str, values: object) -> None:
    """Before ``text % values``."""
    if _HIDDEN_WIDTH.search(text):
        raise TemplateLimitError("takes the width of a field from a value, or has parentheses in a field's name; neither is allowed")
    _allow_fields(budget, text, _PERCENT_FIELD.findall(text), values)


def allow_braces(budget: Budget, text: str, values: object) -> None:
    """Before ``text.format(...)``."""
    text = str.replace(str.replace(text, "{{", ""), "}}", "")
    if re.search(r"\{[^{}]*\{", text):
        raise TemplateLimitError("takes the format of a field from another field, which is not allowed")
    _allow_fields(budget, text, _BRACE_FIELD.findall(text), values)


def _allow_fields(budget: Budget, text: str, fields: list[str], values: object) -> None:
    """Each field may be as wide as all values, or as any number in it says."""
    budget.allow_items(len(fields))
    width = max((int(digits[:20]) for field in fields for digits in _DIGITS.findall(field)), default=0)
    budget.allow(len(text) + len(fields) * (width + budget.weigh(values)[0]))


def allow_replace(budget: Budget, text: object, old: object, new: object) -> None:
    """Before every ``old`` in a text becomes ``new``."""
    text, old, new = str(text), str(old), str(new)
    budget.allow(len(text) + (str.count(text, old) if len(new) > len(old) else 0) * len(new))


def allow_strip(chars: object) -> None:
    """Before ``text.strip(chars)``."""
    if isinstance(chars, str) and len(chars) > MAX_STRIPPED:
        raise TemplateLimitError(f"strips {len(chars)} different characters; at most {MAX_STRIPPED} are allowed")


def allow_search(text: str, sought: object) -> None:
    """Before a text is searched from the right."""
    if isinstance(sought, str):
        allow_steps(len(sought) * (len(text) - len(sought)))


def allow_join(budget: Budget, separator: object, items: list) -> None:
    """Before items become one text."""
    budget.allow(budget.weigh(items)[0] + len(str(separator)) * len(items))


def allow_keys(values: Iterable[object]) -> None:
    """Before values become the keys of a mapping or a set."""
    num_odd = sum(not (value is None or isinstance(value, str) or (isinstance(value, int) and abs(value) <= MAX_PLAIN_INT)) for value in values)
    if num_odd > MAX_COLLIDING:
        raise TemplateLimitError(f"looks for equal ones among {num_odd} values that are no texts; at most {MAX_COLLIDING} are allowed")


def allow_rounding(precision: object) -> None:
    """Before a number is rounded to so many digits."""
    if isinstance(precision, int) and abs(precision) > MAX_PRECISION:
        raise TemplateLimitError(f"rounds to {precision} digits; at most {MAX_PRECISION} are allowed")


def allow_steps(num_steps: int) -> None:
    """Before something that takes so many steps."""
    if num_steps > MAX_STEPS:
        raise TemplateLimitError(f"does something of {num_steps} steps in one call; at most {MAX_STEPS} are allowed")


def allow_start(start: object) -> None:
    """Before values are added up."""
    if not isinstance(start, int | float):
        raise TemplateLimitError(f"adds up from {type(start).__name__}; only numbers can be added up")


def allow_mapping(args: tuple) -> None:
    """Before ``dict(...)`` of pairs."""
    if any(isinstance(arg, list) and len(arg) > MAX_COLLIDING for arg in args):
        raise TemplateLimitError(f"makes a mapping of over {MAX_COLLIDING} pairs")


def allow_time_format(text: object) -> None:
    """Before a time is written in a format."""
    if len(str(text)) > MAX_TIME_FORMAT:
        raise TemplateLimitError(f"writes the time in a format of {len(str(text))} characters; at most {MAX_TIME_FORMAT} are allowed")
