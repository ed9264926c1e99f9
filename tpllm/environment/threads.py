"""How many threads compute on a CPU."""
import os

from tpllm.errors import ConfigError


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
