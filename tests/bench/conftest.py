"""Commands and scripts of benchmarks, as the tests of this folder run them."""
import importlib.util
import pathlib
import types

import pytest

from tpllm.cli.main import main

SCRIPTS = pathlib.Path(__file__).parents[2] / "benchmarks"


def bench(name: str, *words: str) -> int:
    """The exit code of ``tpllm bench NAME ...``."""
    try:
        return main(["bench", name, *words])
    except SystemExit as stop:
        return stop.code


def load_script(name: str, **packages: str) -> types.ModuleType:
    """A benchmark script as a module; skips where one of ``packages`` (module -> what pip calls it) is missing."""
    for module, package in packages.items():
        pytest.importorskip(module, reason=f"the oracle extra brings {package}")
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        spec.loader.exec_module(module)
    return module
