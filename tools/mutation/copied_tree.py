"""A copy of the working tree, in which faults are made: whoever works on the tree itself sees nothing of it."""
from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from tools.mutation.mutant import Mutant

LIBRARY = [pathlib.Path("tpllm/native") / name for name in ("_kernels.so", "_kernels.so.sha256")]  # with its size and checksum
TEST_CACHE = pathlib.Path("build/test-cache")
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "__pycache__")
FIRST_TIME_S = 1_000_000_000


class BuildError(RuntimeError):
    """The native library cannot be built with a mutant's change, or without one."""


class CopiedTree:
    """A copy that has one fault at a time.

    Attributes:
        path: its root.
    """

    def __init__(self, path: pathlib.Path, flags: str):
        self.path, self._flags = path, flags
        self._num_written = 0

    def environment(self) -> dict[str, str]:
        """For programs that are to run this tree's code, and not that of an editable install."""
        kept = {key: value for key, value in os.environ.items() if key not in ("TPLLM_CACHE_DIR", "TPLLM_NATIVE", "TPLLM_ISA")}
        return {**kept, "PYTHONPATH": str(self.path), "XLA_FLAGS": self._flags}

    @contextlib.contextmanager
    def fault(self, mutant: Mutant | None) -> Iterator[None]:
        """The tree with a fault, inside.

        Raises:
            StaleError: see :meth:`.Mutant.applied`.
        """
        if mutant is None:
            yield
            return
        path = self.path / mutant.file
        before = path.read_bytes()
        self._write(path, mutant.applied(self.path).encode())
        try:
            yield
        finally:
            self._write(path, before)

    @contextlib.contextmanager
    def built_library(self, isa: str) -> Iterator[None]:
        """The native library of the tree as it is now, inside: not optimized, and of few instruction sets, since building is most of the time.

        Raises:
            BuildError: it cannot be built.
        """
        folder, placed = self.path / "build" / f"native-{isa or 'portable'}", [self.path / path for path in LIBRARY]
        kept = {path: path.read_bytes() for path in placed if path.exists()}
        unwanted = {"AVX2", "AVX512", "AVX512_BF16"} - {isa.upper()}
        configure = ["cmake", "-S", "tpllm/native", "-B", folder, "-G", "Ninja", "-DTPLLM_INPLACE=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O0",
                     f"-DPython_EXECUTABLE={sys.executable}", *(f"-DTPLLM_TAKES_{name}=OFF" for name in sorted(unwanted))]
        path = f"{os.environ['PATH']}:{pathlib.Path(sys.executable).parent}"  # CMake and Ninja may be the virtual environment's
        try:
            for command in ([] if folder.exists() else [configure]) + [["cmake", "--build", folder]]:
                done = subprocess.run(command, cwd=self.path, env={**os.environ, "PATH": path}, capture_output=True, text=True)
                if done.returncode:
                    raise BuildError(f"{' '.join(map(str, command[:3]))} ended with code {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
            yield
        finally:
            for path in placed:
                path.unlink(missing_ok=True)
                if path in kept:
                    path.write_bytes(kept[path])

    def _write(self, path: pathlib.Path, content: bytes) -> None:
        """Python takes byte code for that of a source of the same size and second, so no two versions may have the same second."""
        path.write_bytes(content)
        if path.suffix == ".py":
            self._num_written += 1
            os.utime(path, (FIRST_TIME_S + self._num_written,) * 2)


@contextlib.contextmanager
def copied_tree(root: pathlib.Path, flags: str) -> Iterator[CopiedTree]:
    """A copy of what git knows of a tree or would add, with the native library and compiled programs as they are; removed at the end.

    It lies below ``build/``, so that compiled programs need no copy: they are linked, and what faulty code compiles stays in the copy.
    """
    (root / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutants-", dir=root / "build", ignore_cleanup_errors=True) as name:
        path = pathlib.Path(name)
        for relative in _source_files(root):
            (path / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / relative, path / relative)
        cache = pathlib.Path(os.environ.get("TPLLM_CACHE_DIR", root / TEST_CACHE))
        if cache.is_dir():
            (path / TEST_CACHE).parent.mkdir(exist_ok=True)
            shutil.copytree(cache, path / TEST_CACHE, copy_function=_link_or_copy)
        yield CopiedTree(path, flags)


def _source_files(root: pathlib.Path) -> list[pathlib.Path]:
    if (root / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, check=True, capture_output=True,
                                text=True).stdout
        files = [pathlib.Path(name) for name in listed.split("\0") if name and (root / name).is_file()]
    else:
        files = [pathlib.Path(folder, name).relative_to(root) for folder, folders, names in os.walk(root)
                 for name in _kept(folder, folders, names)]
    return files + [path for path in LIBRARY if (root / path).exists()]


def _kept(folder: str, folders: list[str], names: list[str]) -> list[str]:
    ignored = NOT_COPIED(folder, [*folders, *names])
    folders[:] = [name for name in folders if name not in ignored]
    return [name for name in names if name not in ignored]


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
