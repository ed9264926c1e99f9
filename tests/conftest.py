"""Every test runs on eight virtual CPU devices, with strict dtype promotion, a compile cache shared between runs, and the compile guard on."""
import gc
import os
import pathlib
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("TPLLM_COMPILE_GUARD", "raise")
os.environ.setdefault("TPLLM_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / "build" / "test-cache"))

import jax
import pytest

from tpllm.native import library

gc.disable()  # until all tests are collected: what that makes stays, and looking through it takes a third of the time
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", os.environ["TPLLM_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # writing a smaller program down takes longer than it saves
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_traceback_in_locations_limit", 0)  # of each operation that is lowered

MAPPINGS = pathlib.Path("/proc/self/maps")
MAX_MAPPINGS = 25_000  # Linux allows a process 65 530 mappings of memory, and every compiled program takes some: beyond, XLA crashes
MAX_OBJECTS = 1_500_000  # with what JAX holds of them outside of Python this is 2 to 3 GB, and to look through them takes a second


def pytest_collection_finish() -> None:
    """Python's garbage collections begin with the first test."""
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def few_compiled_programs() -> Iterator[None]:
    """Between modules: forgets compiled programs where they are many, and collects the garbage that :func:`small_garbage` left out."""
    yield
    if gc.get_freeze_count() > MAX_OBJECTS or (MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MAX_MAPPINGS):
        jax.clear_caches()
        gc.unfreeze()
        gc.collect()


@pytest.fixture(autouse=True)
def small_garbage() -> None:
    """Leaves what is there before a test out of Python's garbage collections: each end of an ``LLM`` is one, and a quarter second is too long to look
    through the millions of objects that JAX keeps of compiled programs."""
    gc.freeze()


@pytest.fixture(scope="session")
def num_devices() -> int:
    """How many virtual devices there are."""
    return len(jax.devices())


@pytest.fixture(scope="session")
def native_library() -> None:
    """Skips where the native library is not built."""
    if not library.is_available():
        pytest.skip("the native library is not built here")
