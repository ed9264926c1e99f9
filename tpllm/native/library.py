"""The native library: whether it is there, which instruction set it runs, and its calls inside a jitted program.

``TPLLM_NATIVE=0`` turns it off; then, and where it was not built, XLA computes everything. ``TPLLM_ISA`` names the instruction set to use
(by default the best that this processor runs), ``TPLLM_NUM_THREADS`` how many threads share the work.
"""
import contextlib
import ctypes
import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from tpllm.environment.threads import num_threads
from tpllm.errors import ConfigError, log

PATH = Path(__file__).with_name("_kernels.so")
FLOAT_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
"""The dtypes of activations and results."""
TARGETS = ("linear", "gated_mlp", "expert_mlps", "lookup", "rms_norm", "row_sums", "attention", "pool_size")


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The loaded library with its XLA targets registered, or None; said once in the log.

    Raises:
        ConfigError: ``TPLLM_ISA`` names an instruction set that does not run here.
    """
    if os.environ.get("TPLLM_NATIVE", "1") == "0":
        log.info("native kernels: turned off by TPLLM_NATIVE=0; XLA computes everything")
        return None
    if not PATH.exists():
        log.warning("native kernels: not built (there was no C++17 compiler at installation, or it failed: `pip install -v` shows it); XLA computes "
                    "everything, which is slow for weights of under 32 bits. Install a compiler, then tpllm again")
        return None
    try:
        if (fault := find_fault(PATH)) is None:
            return _register(ctypes.CDLL(str(PATH)))
    except (OSError, AttributeError) as error:  # whole, but of another architecture or another version of tpllm
        fault = f"cannot be opened ({error})"
    log.warning("native kernels: %s %s; it is not used, and XLA computes everything. Install tpllm again", PATH, fault)
    return None


def find_fault(path: Path) -> str | None:
    """What is wrong with a library, or None: a damaged one would end the process while it is opened or when it is first called. Its size and
    checksum must be those that the build wrote beside it."""
    record = path.with_name(path.name + ".sha256")
    try:
        size, digest = record.read_text().split() if record.is_file() else ()  # a pipe would wait for a writer
    except (OSError, ValueError):
        return f"has no size and checksum beside it ({record.name})"
    if not path.is_file() or str(path.stat().st_size) != size:
        return f"is damaged: it is no file of {size} bytes"
    with open(path, "rb") as file:
        return None if hashlib.file_digest(file, "sha256").hexdigest() == digest else "is damaged: its checksum is not that of the build"


def _register(loaded: ctypes.CDLL) -> ctypes.CDLL | None:
    """Make its handlers XLA targets; None where this jaxlib cannot take them."""
    for name in ("tpllm_isa", "tpllm_isas", "tpllm_jaxlib_version"):
        getattr(loaded, name).restype = ctypes.c_char_p
    built_with = loaded.tpllm_jaxlib_version().decode()
    if _minor(built_with) > _minor(jaxlib.__version__):  # registering it would leave JAX without any CPU device
        log.warning("native kernels: built with jaxlib %s, and this is %s, which is older: XLA computes everything. Install tpllm again in this "
                    "environment", built_with, jaxlib.__version__)
        return None
    loaded.tpllm_pack.argtypes = [ctypes.c_int64, ctypes.c_void_p, *[ctypes.c_int64] * 5, ctypes.c_void_p]
    if not loaded.tpllm_isa():
        raise ConfigError(f"TPLLM_ISA is {os.environ.get('TPLLM_ISA')!r}; this processor runs {loaded.tpllm_isas().decode().replace(' ', ', ')}")
    for name in TARGETS:
        jax.ffi.register_ffi_target(f"tpllm_{name}", jax.ffi.pycapsule(getattr(loaded, f"tpllm_{name}")), platform="cpu")
    log.info("native kernels: %s", loaded.tpllm_isa().decode())
    return loaded


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def is_available() -> bool:
    """Whether there are native kernels to use."""
    return load_library() is not None


def instruction_set() -> str | None:
    """The instruction set of the kernels in use, or None without them."""
    return load_library().tpllm_isa().decode() if is_available() else None


def instruction_sets() -> tuple[str, ...]:
    """All that were built and run on this processor, best first."""
    return tuple(load_library().tpllm_isas().decode().split()) if is_available() else ()


@contextlib.contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Run what is called inside by the kernels of another instruction set: for tests and measurements.

    Raises:
        ConfigError: one that does not run here.
    """
    previous = load_library().tpllm_isa()
    if not load_library().tpllm_use_isa(name.encode()):
        raise ConfigError(f"the instruction set {name!r} does not run here; take one of {', '.join(instruction_sets())}")
    try:
        yield
    finally:
        load_library().tpllm_use_isa(previous)


def call(target: str, results, *arguments: jax.Array, aliases: dict[int, int] | None = None, **attributes):
    """One kernel call inside a program; see csrc/bindings.cc for what each takes. ``max_threads`` is ``TPLLM_NUM_THREADS``."""
    load_library()
    function = jax.ffi.ffi_call(f"tpllm_{target}", results, input_output_aliases=aliases or {}, vmap_method="sequential")
    return function(*arguments, **attributes, max_threads=np.int64(num_threads() or 0))


def pool_size() -> int:
    """How many threads XLA's pool has."""
    load_library()
    call_one = jax.ffi.ffi_call("tpllm_pool_size", jax.ShapeDtypeStruct((1,), np.int32))
    return int(jax.jit(call_one)()[0])
