"""Which Pythons and versions of jax were tried, and what is said on any other.

It runs before anything else of tpllm, also on a Python that is too old. So it imports next to nothing, and no jax where a wheel tells its version.
"""
from __future__ import annotations

import importlib.util
import itertools
import os
import sys

from tpllm.errors import VersionError

PYTHON = ">=3.11,<3.14"
JAX = ">=0.10.2,!=0.11.0,!=0.11.1,!=0.12.0,<=0.12.0.1"
"""As pyproject.toml has them, which a test compares. Each version of it passes `make test-newest`; docs/getting_started.md has the table."""
OPERATORS = {  # longer ones first
    ">=": lambda found, bound: found >= bound, "<=": lambda found, bound: found <= bound, "!=": lambda found, bound: found != bound,
    "<": lambda found, bound: found < bound,
}
USER_ERROR = 2


def check() -> None:
    """Let only versions pass that were tried; `tpllm doctor` tells of others itself.

    Raises:
        VersionError: another one, or no jax.
        SystemExit: the same on the command line, where it is one line on standard error.
    """
    if _is_command_line() and sys.argv[1:2] == ["doctor"]:
        return
    message = python_refusal(".".join(map(str, sys.version_info[:3]))) or jax_refusal(find_jax())
    if message is None:
        return
    if _is_command_line():
        print(f"tpllm: error: {message}", file=sys.stderr)
        raise SystemExit(USER_ERROR)
    raise VersionError(message)


def python_refusal(python: str) -> str | None:
    """Why tpllm does not run on a Python; None where it does."""
    return None if is_within(python, PYTHON) else (
        f"this is Python {python}, and tpllm needs Python {PYTHON}: make an environment with such a one, as by `python3.13 -m venv .venv`, and "
        "install tpllm there")


def jax_refusal(jax: str | None) -> str | None:
    """The same for a jax; None where there is none."""
    if jax is None:
        return f"jax is not installed here, and tpllm needs jax {JAX}: install tpllm with what it needs, as by `pip install -e .` in its folder"
    return None if is_within(jax, JAX) else f"this is jax {jax}, and tpllm needs jax {JAX}: pip install 'jax{JAX}'"


def is_within(version: str, allowed: str) -> bool:
    """Whether a version is a release that satisfies all of ``">=1.2,<3"``; what a build appends after a ``+`` does not count."""
    found = _numbers(version.partition("+")[0])
    bounds = ((next(sign for sign in OPERATORS if bound.startswith(sign)), bound) for bound in allowed.split(","))
    return found is not None and all(OPERATORS[sign](found, _numbers(bound[len(sign):])) for sign, bound in bounds)


def find_jax() -> str | None:
    """The version that `import jax` gives, or gave; None where there is none. Only one that was installed from no wheel is imported for that."""
    if "jax" not in sys.modules:
        spec = importlib.util.find_spec("jax")
        if spec is None or spec.origin is None:
            return None
        wheels = [name for name in _names_beside(os.path.dirname(spec.origin)) if name.startswith("jax-") and name.endswith(".dist-info")]
        if len(wheels) == 1:
            return wheels[0][len("jax-"):-len(".dist-info")]
    import jax
    return jax.__version__


def _names_beside(folder: str) -> list[str]:
    try:
        return os.listdir(os.path.dirname(folder))
    except OSError:  # it lies in an archive
        return []


def _numbers(version: str) -> list[int] | None:
    """[0, 12] of ``"0.12.0"``; None of anything but a release."""
    parts = version.split(".")
    if not all(part.isdecimal() for part in parts):
        return None
    numbers = [*map(int, parts)]
    return numbers[:len(numbers) - len([*itertools.takewhile(lambda number: number == 0, reversed(numbers))])]


def _is_command_line() -> bool:
    """Whether it is the command ``tpllm`` that imports, or `python -m`, which imports a package before it runs a module of it."""
    program = (getattr(sys, "argv", None) or [""])[0]
    return program == "-m" or os.path.splitext(os.path.basename(program))[0] == "tpllm"
