"""A job's ``prompt_template``: the prompt of a row made of its fields, as in ``"Summarize: {text}"``."""
import string
from collections.abc import Collection, Mapping
from typing import Any

from tpllm.errors import JobError, did_you_mean
from tpllm.jobs.json_line import to_line


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """The pieces of a template: a text, and the field that follows it, None at the end; ``{{`` and ``}}`` are braces of the text.

    Raises:
        JobError: a lone brace, a field without a name, or one with a format, as in ``{text:>9}``.
    """
    fix = "a field is its name in braces, as in {text}; write {{ and }} for braces of the text"
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise JobError(f"prompt_template is {template!r}: {error}; {fix}") from None
    for _, name, form, conversion in pieces:
        if name is not None and (not name or form or conversion):
            rest = (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise JobError(f"prompt_template is {template!r}: it has {{{name}{rest}}}; {fix}")
    return [(text, name) for text, name, _, _ in pieces]


def fields_of(template: str) -> list[str]:
    """The names of the fields in a template."""
    return [name for _, name in parse_template(template) if name is not None]


def render(template: str, fields: Mapping[str, Any]) -> str:
    """A template with the fields of a row: text as it is, anything else as JSON.

    Raises:
        JobError: a field that the row does not have, or that is null.
    """
    require_fields(template, fields, "the row")
    return "".join(text + ("" if name is None else _text(name, fields[name])) for text, name in parse_template(template))


def require_fields(template: str, known: Collection[str], owner: str) -> None:
    """Make sure that all fields of a template are there.

    Args:
        template: the job's.
        known: the names that there are.
        owner: how the error calls what has them.

    Raises:
        JobError: one that is not, with the nearest and all that are.
    """
    for name in fields_of(template):
        if name not in known:
            raise JobError(f"prompt_template asks for {{{name}}}; {did_you_mean(name, known)}{owner} has "
                           f"{', '.join(map(repr, known)) or 'no fields'}")


def _text(name: str, value: Any) -> str:
    if value is None:
        raise JobError(f"prompt_template asks for {{{name}}}, which is null in this row")
    return value if isinstance(value, str) else to_line(value).decode()
