"""YAML as a job file needs it: every key knows its line, a key given twice is an error, and ``1e-3`` is a number."""
import re
from typing import Any

import yaml

from tpllm.errors import JobError

FLOAT_WITHOUT_POINT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")


class _Loader(yaml.SafeLoader):
    """Plain data only; collects the line of every key."""

    def __init__(self, text: str):
        super().__init__(text)
        self.key_lines: dict[tuple[str, ...], int] = {}


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT_WITHOUT_POINT, list("-+0123456789"))


def parse_document(text: str, name: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    """The data of a YAML document, and the line, from 1, of each key given by its path.

    Args:
        text: the document.
        name: how errors call it.

    Raises:
        JobError: not YAML, a key given twice, or a key that is not text.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _note_keys(node, (), loader.key_lines, name)
        return (None if node is None else loader.construct_document(node)), loader.key_lines
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, JobError):
            raise
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise JobError(f"{name}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


def parse_value(text: str, name: str) -> Any:
    """One value as it would stand after a key: ``32``, ``true``, ``[1, 2]``; what is not YAML is text."""
    if not text.strip():
        return text
    try:
        return parse_document(text, name)[0]
    except JobError:
        if text.lstrip()[0] in "[{":
            raise
        return text


def _note_keys(node: yaml.Node | None, path: tuple[str, ...], lines: dict[tuple[str, ...], int], name: str) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise JobError(f"{name} line {line}: a key must be text")
        key_path = (*path, key.value)
        if key_path in lines:
            raise JobError(f"{name} line {line}: {'.'.join(key_path)} is given twice; the first is on line {lines[key_path]}")
        lines[key_path] = line
        _note_keys(value, key_path, lines, name)
