"""What a result depends on besides the model: software, platform and instruction set."""
import functools
import hashlib
import pathlib
import platform


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


def _cpu_flags() -> list[str]:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.processor()]
    return sorted(next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), []))
