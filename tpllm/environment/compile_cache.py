"""Compiled programs on disk, for the next process; they depend on the software and the processor."""
import os
import pathlib

from tpllm.environment.software import instruction_set
from tpllm.environment.threads import limit_threads


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
