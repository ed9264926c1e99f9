"""What a result depends on besides the model: software, platform and instruction set; and the compile cache that is keyed by them."""
import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import platform

from tpllm.errors import ConfigError


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


def num_threads() -> int | None:
    """``$TPLLM_NUM_THREADS``: how many threads compute on a CPU; None for one a core.

    Raises:
        ConfigError: it is no whole number of at least 1.
    """
    text = os.environ.get("TPLLM_NUM_THREADS", "")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"TPLLM_NUM_THREADS is {text!r}; it must be a whole number of at least 1")
    return int(text)


def limit_threads() -> None:
    """Make XLA's pool as large as :func:`num_threads`; it is made with the CPU client, so this must come before the first use of a device."""
    if num_threads() is not None:
        os.environ.setdefault("NPROC", str(num_threads()))  # what XLA asks for the size of its pool


def return_freed_memory() -> None:
    """Give the system back what loading or compiling left free in the C library's heap: tens of MB, which would stay beside the model.

    Only glibc has a call for it; elsewhere this does nothing.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def cache_folder() -> pathlib.Path | None:
    """``$TPLLM_CACHE_DIR``, or ``~/.cache/tpllm`` without it; None where it is ``off``."""
    folder = os.environ.get("TPLLM_CACHE_DIR")
    return None if folder == "off" else pathlib.Path(folder) if folder else pathlib.Path.home() / ".cache" / "tpllm"


def enable_compile_cache() -> None:
    """Keep compiled programs on disk, so that the next process need not compile them.

    Below :func:`cache_folder` there is one folder for each jaxlib version and instruction set: a program compiled for a CPU with other
    features may not run on this one. Without a cache folder it is off; a cache that was configured in JAX already is left alone.
    """
    import jax
    import jaxlib

    limit_threads()
    root = cache_folder()
    if root is None or jax.config.jax_compilation_cache_dir:
        return
    jax.config.update("jax_compilation_cache_dir", str(root / "xla" / f"{jaxlib.__version__}-{instruction_set()}"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
