"""Every module is imported, as on a jax without Pallas' back end for Triton, and warnings are errors."""
import subprocess
import sys

import pytest

CODE = """
import importlib, pkgutil, sys
sys.modules["jax.experimental.pallas.triton"] = None
names = [module.name for package in ("tpllm", "pallas_kernels", "sharding_rules")
         for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + ".")]
for name in names:
    if name == "tpllm.native._kernels":  # a library, not a module of Python
        continue
    try:
        importlib.import_module(name)
    except ImportError as error:
        if error.name != "pyarrow":  # optional
            raise
assert len(names) > 250
"""


@pytest.mark.newest
def test_every_module_imports_without_a_warning_where_jax_has_no_triton():
    done = subprocess.run([sys.executable, "-W", "error", "-c", CODE], capture_output=True, text=True, timeout=300)
    assert (done.stderr, done.returncode) == ("", 0)
