"""Commands and scripts of benchmarks, as the tests of this folder run them."""
import importlib
import types

import pytest

from tpllm.cli.main import main


def bench(name: str, *words: str) -> int:
    """The exit code of ``tpllm bench NAME ...``."""
    try:
        return main(["bench", name, *words])
    except SystemExit as stop:
        return stop.code


def load_script(name: str, **packages: str) -> types.ModuleType:
    """A benchmark's module; skips where one of ``packages`` (module -> what pip calls it) is missing."""
    for module, package in packages.items():
        pytest.importorskip(module, reason=f"the oracle extra brings {package}")
    return importlib.import_module(name)
