"""The versions that are let in are those that pyproject.toml allows and the documentation lists as tried; others end in one line."""
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from tpllm import versions
from tpllm.errors import TpllmError, VersionError

pytestmark = pytest.mark.newest
REPOSITORY = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_the_range_is_that_of_pyproject_and_of_its_extras():
    assert versions.PYTHON == PROJECT["requires-python"]
    needs = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cuda"], *PROJECT["optional-dependencies"]["tpu"]]
    assert [need for need in needs if re.match(r"jax\b", need)] == [f"{name}{versions.JAX}" for name in ("jax", "jax[cuda13]", "jax[tpu]")]


def test_the_documentation_lists_every_version_at_the_ends_of_the_range_as_tried_and_none_outside():
    page = (REPOSITORY / "docs" / "getting_started.md").read_text()
    header, *rows = re.findall(r"^\| .*\|$", page[page.index("| jax |"):].split("\n\n")[0], re.M)
    tried = [cell.strip() for row in rows for cell in row.split("|")[1].split(",")]
    assert all(versions.is_within(version, versions.JAX) for version in tried)
    least, most = (re.search(sign + r"=([\d.]+)", versions.JAX)[1] for sign in "><")
    assert {least, most} <= {re.sub(r"(\.0)+$", "", version) for version in tried} | set(tried)
    pythons = re.findall(r"Python (3\.\d+)", header)
    assert pythons == [f"3.{minor}" for minor in range(40) if versions.is_within(f"3.{minor}", versions.PYTHON)]


def test_the_versions_that_run_this_are_let_in():
    versions.check()
    assert versions.find_jax() == importlib.metadata.version("jax")


@pytest.mark.parametrize(("version", "allowed", "is_allowed"), [
    ("0.10", ">=0.10,<0.13", True), ("0.10.0", ">=0.10,<0.13", True), ("0.9.9", ">=0.10,<0.13", False), ("0.12.9", ">=0.10,<0.13", True),
    ("0.13.0", ">=0.10,<0.13", False), ("0.13.0.dev20261001", ">=0.10,<0.13", False), ("0.12.0.1", "<=0.12.0.1", True),
    ("0.12.0.2", "<=0.12.0.1", False), ("0.12", "<=0.12.0.1", True), ("0.11.1", ">=0.10,!=0.11.1", False), ("0.11.2", ">=0.10,!=0.11.1", True),
    ("1.0.0", ">=0.10,<0.13", False), ("0.12.0+cuda13", ">=0.10,<0.13", True), ("0.12.0rc1", ">=0.10,<0.13", False), ("unknown", ">=0.10", False),
    ("3.9.18", ">=3.11,<3.14", False), ("3.14.0", ">=3.11,<3.14", False), ("3.13.12", ">=3.11,<3.14", True)])
def test_versions_are_compared_as_numbers_and_pre_releases_are_none_that_was_tried(version, allowed, is_allowed):
    assert versions.is_within(version, allowed) == is_allowed


@pytest.mark.parametrize(("refusal", "version", "message"), [
    (versions.python_refusal, "3.10.13", r"this is Python 3\.10\.13, and tpllm needs Python >=3\.11,<3\.14: make an env.*install tpllm there"),
    (versions.python_refusal, "3.14.0", r"this is Python 3\.14\.0, and tpllm needs Python >=3\.11,<3\.14: make an environment.*"),
    (versions.jax_refusal, "0.9.2", r"this is jax 0\.9\.2, and tpllm needs jax >=0\.10\.2,.*: pip install 'jax>=0\.10\.2,.*'"),
    (versions.jax_refusal, "99.0", r"this is jax 99\.0, and tpllm needs jax .*"),
    (versions.jax_refusal, None, r"jax is not installed here, and tpllm needs jax >=0\.10.*pip install.*")])
def test_another_version_is_refused_in_one_line_with_the_range_and_the_fix(refusal, version, message):
    assert re.fullmatch(message, refusal(version))


JAX_INIT = "__version__ = '0.8.1'"


def run(folder: pathlib.Path, *words: str) -> subprocess.CompletedProcess:
    """Python, which finds the packages of this folder first."""
    environment = {"PYTHONPATH": f"{folder}:{REPOSITORY}", "PATH": ""}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("wheels", [[], ["0.8.1"], ["0.10.0", "0.8.1"]], ids=["no wheel's name", "a wheel's name", "two wheels' names"])
def test_on_a_jax_outside_the_range_the_command_line_prints_one_line_and_an_import_ends_in_the_same(tmp_path, wheels):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise RuntimeError('imported')" if len(wheels) == 1 else JAX_INIT)
    for wheel in wheels:
        (tmp_path / f"jax-{wheel}.dist-info").mkdir()
    line = versions.jax_refusal("0.8.1")
    done = run(tmp_path, "-m", "tpllm.cli.main", "generate", "--model", "demo")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"tpllm: error: {line}\n")
    (tmp_path / "tpllm").write_text("from tpllm.cli.main import main\n")  # as pip writes the command
    assert run(tmp_path, tmp_path / "tpllm", "--help").stderr == f"tpllm: error: {line}\n"
    done = run(tmp_path, "-c", "import tpllm")
    assert done.stderr.splitlines()[-1] == f"tpllm.errors.VersionError: {line}"


def test_on_another_python_it_is_refused_before_jax_is_looked_for(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    monkeypatch.setattr(versions, "find_jax", lambda: pytest.fail("looked for jax"))
    with pytest.raises(VersionError, match=r"^this is Python 3\.10\.13, and tpllm needs Python >=3\.11,<3\.14: make an environment"):
        versions.check()
    assert issubclass(VersionError, ImportError)
    assert issubclass(VersionError, TpllmError)
