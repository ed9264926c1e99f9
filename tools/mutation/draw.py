"""Drawing faults: simple operators on the syntax tree of one line, chosen by a seed."""
from __future__ import annotations

import ast
import json
import pathlib
import random
from collections.abc import Callable, Iterator

from tools.mutation.mutant import Mutant

PACKAGES = ("tpllm/engine", "tpllm/model", "tpllm/weights", "tpllm/checkpoint", "tpllm/tokenizer", "tpllm/jobs", "pallas_kernels")
FLIPPED = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="),
           ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is")}
SWAPPED_NAMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any"}
SWAPPED_SIGNS = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "//"), ast.FloorDiv: ("//", "*")}
QUIET_CALLS = ("info", "warning", "debug", "add_argument")
"""Of the log and of help: what they print is not worth a mutant."""

Change = tuple[str, int, int, str]
"""(operator, first column, column past the last, what stands there instead)."""


def draw(root: pathlib.Path, count: int, *, seed: int) -> list[Mutant]:
    """``count`` mutants of the packages in turn, of operators alike; the same for the same tree and seed. They have no tests yet."""
    rng, mutants = random.Random(seed), []
    found = {package: _by_operator(root, package) for package in PACKAGES}
    while len(mutants) < count and any(found.values()):
        for sites in found.values():
            if sites and len(mutants) < count:
                operator = rng.choice(sorted(sites))
                file, old, new = sites[operator].pop(rng.randrange(len(sites[operator])))
                if not sites[operator]:
                    del sites[operator]
                name = f"drawn-{seed}-{len(mutants):03}"
                mutants.append(Mutant(name, file, old, new, tests=(), drawn=f"seed {seed}, {operator}"))
    return mutants


def _by_operator(root: pathlib.Path, package: str) -> dict[str, list[tuple[str, str, str]]]:
    """(file, old line, new line) of every place in a package, by operator: some have many more places than others."""
    sites: dict[str, list[tuple[str, str, str]]] = {}
    for path in sorted((root / package).rglob("*.py")):
        for operator, old, new in _sites(path.read_text("utf-8")):
            sites.setdefault(operator, []).append((str(path.relative_to(root)), old, new))
    return sites


def to_toml(mutants: list[Mutant]) -> str:
    """Entries for ``drawn.toml``."""
    return "\n".join(f"[[mutant]]\nname = {json.dumps(mutant.name)}\nfile = {json.dumps(mutant.file)}\nold = {_literal(mutant.old)}\n"
                     f"new = {_literal(mutant.new)}\ntests = {json.dumps(list(mutant.tests))}\ndrawn = {json.dumps(mutant.drawn)}\n"
                     for mutant in mutants)


def _literal(text: str) -> str:
    return f"'''{text}'''" if "'''" not in text and not text.endswith("'") else json.dumps(text)


def _sites(source: str) -> list[tuple[str, str, str]]:
    """Every (operator, old line, new line) of a file, without those whose line is there twice."""
    lines, found = source.split("\n"), []
    for node in _nodes(ast.parse(source)):
        where = node.test if isinstance(node, ast.If | ast.While) else node  # what is changed of it
        if getattr(where, "lineno", None) is None or where.lineno != where.end_lineno:
            continue
        line = lines[where.lineno - 1]
        if not line.isascii() or lines.count(line) > 1:  # the tree counts bytes
            continue
        for operator, first, last, text in _changes(node, line):
            new = line[:first] + text + line[last:]
            if _parses([*lines[:where.lineno - 1], new, *lines[where.lineno:]]):
                found.append((operator, line.strip(), new.strip()))
    return found


def _parses(lines: list[str]) -> bool:
    try:
        ast.parse("\n".join(lines))
    except SyntaxError:
        return False
    return True


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that compute: none of what is raised, logged, asserted or only tells types."""
    for field, value in ast.iter_fields(tree):
        for node in value if isinstance(value, list) else [value]:
            if not isinstance(node, ast.AST) or field in ("annotation", "returns", "decorator_list") or isinstance(node, ast.Raise | ast.Assert):
                continue
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and getattr(node.value.func, "attr", "") in QUIET_CALLS:
                continue
            yield node
            yield from _nodes(node)


def _changes(node: ast.AST, line: str) -> Iterator[Change]:
    for change in CHANGES:
        yield from change(node, line)


def _between(line: str, left: ast.AST, right: ast.AST, sign: str) -> tuple[int, int] | None:
    """The columns of a sign between two nodes."""
    first = line.find(sign, left.end_col_offset, right.col_offset)
    return None if first < 0 else (first, first + len(sign))


def _flip_comparison(node: ast.AST, line: str) -> Iterator[Change]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        old, new = FLIPPED[type(node.ops[0])]
        if at := _between(line, node.left, node.comparators[0], old):
            yield "comparison flipped", *at, new


def _swap_and_or(node: ast.AST, line: str) -> Iterator[Change]:
    if isinstance(node, ast.BoolOp):
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        if at := _between(line, node.values[-2], node.values[-1], old):
            yield "and and or swapped", *at, new


def _change_constant(node: ast.AST, line: str) -> Iterator[Change]:
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        at = node.col_offset, node.end_col_offset
        if isinstance(node.value, bool):
            yield "a constant changed", *at, str(not node.value)
        elif isinstance(node.value, int):
            yield "off by one", *at, str(node.value + 1)
        else:
            yield "a constant changed", *at, str(node.value * 2 + 1)


def _swap_sign(node: ast.AST, line: str) -> Iterator[Change]:
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPPED_SIGNS:
        old, new = SWAPPED_SIGNS[type(node.op)]
        if at := _between(line, node.left, node.right, old):
            yield "sign changed", *at, new


def _swap_name(node: ast.AST, line: str) -> Iterator[Change]:
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in SWAPPED_NAMES:
            yield "min and max or any and all swapped", node.func.end_col_offset - len(name), node.func.end_col_offset, SWAPPED_NAMES[name]


def _swap_arguments(node: ast.AST, line: str) -> Iterator[Change]:
    if isinstance(node, ast.Call) and len(node.args) >= 2 and not any(isinstance(one, ast.Starred) for one in node.args[:2]):
        first, second = node.args[:2]
        texts = [line[one.col_offset:one.end_col_offset] for one in (first, second)]
        if texts[0] != texts[1]:
            yield ("arguments swapped", first.col_offset, second.end_col_offset,
                   texts[1] + line[first.end_col_offset:second.col_offset] + texts[0])


def _add_not(node: ast.AST, line: str) -> Iterator[Change]:
    test = getattr(node, "test", None)
    if isinstance(node, ast.IfExp | ast.If | ast.While) and not isinstance(test, ast.Compare):
        yield "a not added", test.col_offset, test.end_col_offset, f"not ({line[test.col_offset:test.end_col_offset]})"


def _remove_statement(node: ast.AST, line: str) -> Iterator[Change]:
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if is_call or isinstance(node, ast.AugAssign | ast.Continue | ast.Break | ast.Delete):
        yield "a statement removed", node.col_offset, node.end_col_offset, "pass"


CHANGES: tuple[Callable[[ast.AST, str], Iterator[Change]], ...] = (
    _flip_comparison, _swap_and_or, _change_constant, _swap_sign, _swap_name, _swap_arguments, _add_not, _remove_statement)
