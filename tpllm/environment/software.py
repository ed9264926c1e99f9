"""What a result depends on besides the model: software, platform and instruction set."""
import functools
import hashlib
import importlib.metadata
import pathlib
import platform
from collections.abc import Iterable


def describe_environment(device_platform: str, device_kind: str) -> dict[str, str]:
    """Versions and hardware that decide the last bits of a result, for manifests."""
    import jax
    import jaxlib

    return {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "platform": device_platform, "device_kind": device_kind,
            "instruction_set": instruction_set() if device_platform == "cpu" else device_kind}


@functools.cache
def instruction_set() -> str:
    """The machine's architecture and a digest of its CPU features, as in ``x86_64-avx512f-1f2e3d4c``."""
    flags = _cpu_flags()
    widest = next((name for name in ("avx512f", "avx2", "avx", "asimd") if name in flags), "base")
    return f"{platform.machine()}-{widest}-{hashlib.sha256(' '.join(flags).encode()).hexdigest()[:8]}"


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of those of some packages that are installed, by name."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    return _cpuinfo("model name") or platform.processor()


def _cpu_flags() -> list[str]:
    return sorted(_cpuinfo("flags", "Features").split()) or [platform.processor()]


def _cpuinfo(*keys: str) -> str:
    """What Linux tells of the first processor under one of some keys; empty where it tells nothing."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(keys)), "")
