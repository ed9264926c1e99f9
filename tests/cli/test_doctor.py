"""`tpllm doctor`: what it tells, and that a broken installation does not keep it from telling the rest."""
import pathlib
import platform
import subprocess
import sys

import jax
import pytest

from tpllm import __version__
from tpllm.cli.main import main
from tpllm.native import library

REPOSITORY = pathlib.Path(__file__).parents[2]
TITLES = ["tpllm", "packages", "processor", "native", "devices", "memory", "caches", "settings"]


def titles(out: str) -> list[str]:
    return [line.split()[0] for line in out.splitlines() if not line.startswith(" ")]


def test_it_tells_versions_devices_kernels_memory_and_settings(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TPLLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "a secret")
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert [title for title in titles(out) if title != "nvidia-smi"] == TITLES
    for fact in (f"{__version__} in ", f"Python {platform.python_version()}", f"jax {jax.__version__}", f"{len(jax.devices())} x cpu (cpu)",
                 f"programs and models: {tmp_path}, 0.00 GB", f"TPLLM_CACHE_DIR={tmp_path}", "GB free for this process"):
        assert fact in out
    assert (err, "a secret" in out) == ("", False)


@pytest.mark.parametrize(("content", "message"), [(None, "the library is not built: "), (b"no library", "has no size and checksum beside it")])
def test_a_library_that_is_missing_or_damaged_is_told(capsys, monkeypatch, tmp_path, content, message):
    monkeypatch.setattr(library, "PATH", tmp_path / "kernels.so")
    monkeypatch.setenv("TPLLM_CACHE_DIR", "off")
    if content is not None:
        library.PATH.write_bytes(content)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    line, = [line for line in out.splitlines() if line.startswith("native")]
    assert message in line
    assert "TPLLM_CACHE_DIR is off: programs are compiled anew by each process" in out


def test_where_jax_cannot_be_imported_it_tells_the_rest(tmp_path):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise RuntimeError('no such driver')")
    (tmp_path / "jax-0.1.0.dist-info").mkdir()
    done = subprocess.run([sys.executable, "-m", "tpllm.cli.main", "doctor"], env={"PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "PATH": ""},
                          capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr, titles(done.stdout)) == (0, "", TITLES)
    assert "this is jax 0.1.0, and tpllm needs jax" in done.stdout
    assert "devices     not known: RuntimeError: no such driver" in done.stdout
    assert "GB free for this process" in done.stdout
