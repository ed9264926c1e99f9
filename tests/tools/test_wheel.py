"""What a wheel holds; `make wheels` builds those with the native library, and auditwheel checks which systems they open on."""
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_one_wheel_serves_every_python_and_holds_the_packages_and_the_demo_model_but_no_sources_of_the_library(tmp_path):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "TPLLM_NATIVE": "0"})
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")  # with the library: -py3-none- and a platform
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"tpllm", "sharding_rules", "pallas_kernels"}
    assert {"tpllm/native/library.py", "tpllm/cli/entry.py"} < set(names)
    assert any(name.startswith("tpllm/") and name.endswith(".safetensors") for name in names)
    assert not [name for name in names if "csrc" in name or name.endswith((".so", "CMakeLists.txt", ".sha256"))]
