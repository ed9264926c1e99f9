"""Show what a bug report needs: versions, processor, native kernels, devices and their links, memory, caches and settings.

It tells as much as it can where jax, a device or the native library does not work.
"""
import argparse
import collections
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tpllm import __version__, versions
from tpllm.cli.list import short_path

PACKAGES = ("jax", "jaxlib", "numpy", "ml-dtypes", "flax", "orbax-checkpoint", "tokenizers", "huggingface-hub", "gguf", "jax-cuda13-plugin",
            "jax-cuda12-plugin", "libtpu")
SETTINGS = ("TPLLM_", "JAX_", "XLA_", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "NPROC")
"""How the names of the environment variables that are shown begin: none of them holds a secret."""
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max", "--format=csv,noheader")
GB = 10**9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments: none."""


def run(args: argparse.Namespace, *, make_llm: Callable[..., Any] | None) -> int:
    """Run the command; returns the exit code."""
    for title, facts in (("tpllm", _tpllm), ("packages", _packages), ("processor", _processor), ("native", _native), ("devices", _devices),
                         ("nvidia-smi", _nvidia), ("memory", _memory), ("caches", _caches), ("settings", _settings)):
        try:
            for fact in facts():
                print(f"{title:<11} {fact}")
                title = ""
        except Exception as error:  # a broken installation can fail in any way, and the other facts say more of it
            print(f"{title:<11} not known: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return 0


def _tpllm() -> Iterator[str]:
    yield f"{__version__} in {short_path(Path(__file__).parents[1])}"
    yield f"Python {platform.python_version()}, {platform.platform()}"
    yield from filter(None, [versions.python_refusal(platform.python_version())])


def _packages() -> Iterator[str]:
    from tpllm.environment.software import package_versions
    yield ", ".join(f"{name} {version}" for name, version in package_versions(PACKAGES).items()) or "none"
    yield from filter(None, [versions.jax_refusal(versions.find_jax())])


def _processor() -> Iterator[str]:
    from tpllm.environment.software import cpu_model, instruction_set
    from tpllm.environment.threads import num_threads
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"{cpu_model()}, {usable} of {os.cpu_count()} cores, {num_threads() or 'all'} of them used, {instruction_set()}"


def _native() -> Iterator[str]:
    from tpllm.native import library
    if not library.PATH.is_file():
        yield "the library is not built: 16-bit and quantized weights are slow on this CPU (pip install -v shows why)"
    elif fault := library.find_fault(library.PATH):
        yield f"{short_path(library.PATH)} {fault}"
    elif not library.is_available():
        yield "the library is built and not used"
    else:
        yield f"{library.instruction_set()} is used; this processor runs {', '.join(library.instruction_sets())}"


def _devices() -> Iterator[str]:
    import jax

    from tpllm.environment.memory import device_free_bytes
    from tpllm.plan.devices import LIMITS
    devices = jax.devices()
    for (platform_name, kind), count in collections.Counter((device.platform, device.device_kind) for device in devices).items():
        facts, limits = [f"{count} x {kind} ({platform_name})"], LIMITS.get(kind)
        free = [device_free_bytes(device) for device in devices if device.device_kind == kind]
        facts += [f"{min(free) / GB:.1f} GB free on each"] if None not in free else []
        facts += [f"memory {limits.bytes_per_s / GB:.0f} GB/s"] if limits and limits.bytes_per_s else []
        facts += [f"link {limits.link_bytes_per_s / GB:.0f} GB/s one way"] if limits and limits.link_bytes_per_s else []
        yield ", ".join(facts)


def _nvidia() -> Iterator[str]:
    if shutil.which(NVIDIA_SMI[0]):
        yield "name, driver, memory, PCIe generation, PCIe lanes"
        yield from subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()


def _memory() -> Iterator[str]:
    import psutil

    from tpllm.environment.memory import host_free_bytes
    yield f"{psutil.virtual_memory().total / GB:.1f} GB, {host_free_bytes() / GB:.1f} GB free for this process"


def _caches() -> Iterator[str]:
    from tpllm.environment.compile_cache import cache_folder
    folder = cache_folder()
    yield "TPLLM_CACHE_DIR is off: programs are compiled anew by each process" if folder is None else _folder("programs and models", folder)
    from huggingface_hub import constants
    yield _folder("hub", Path(constants.HF_HUB_CACHE))


def _folder(what: str, folder: Path) -> str:
    if not folder.is_dir():
        return f"{what}: {short_path(folder)}, not there yet"
    used = sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_symlink())
    return f"{what}: {short_path(folder)}, {used / GB:.2f} GB, {shutil.disk_usage(folder).free / GB:.1f} GB free on the disk"


def _settings() -> Iterator[str]:
    found = sorted(name for name in os.environ if name.startswith(SETTINGS))
    yield from [f"{name}={os.environ[name]}" for name in found] or ["none"]
