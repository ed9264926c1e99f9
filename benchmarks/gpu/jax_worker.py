"""Tasks of the worker that runs JAX: sides of contests, ceilings, and the machine."""
import logging
import subprocess
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu import jax_sides, prepared
from benchmarks.gpu.jax_peers import PEERS
from benchmarks.gpu.jax_sides import Side
from benchmarks.gpu.prepared import measure
from tpllm.bench.bandwidth import device_bandwidth
from tpllm.bench.machine import describe_machine
from tpllm.environment.compile_cache import enable_compile_cache

GPU_FIELDS = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.sm", "temperature.gpu", "utilization.gpu")

SIDES = jax_sides.SIDES | PEERS

__all__ = ["SIDES", "copy_bandwidth", "describe", "drop", "matmul_seconds", "measure", "prepare"]


def describe() -> dict[str, Any]:
    """The machine and its first device; JSON-able."""
    enable_compile_cache()
    device = jax.devices()[0]
    return {**describe_machine(device), "compute_capability": getattr(device, "compute_capability", None),
            "device_memory_bytes": (device.memory_stats() or {}).get("bytes_limit"), "nvidia_smi": _nvidia_smi()}


def _nvidia_smi() -> dict[str, str] | None:
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader", "-i", "0"]
    try:
        line = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
    return dict(zip(GPU_FIELDS, (value.strip() for value in line.split(",")), strict=False))


def prepare(key: str, side: str, sizes: dict[str, Any], target_bytes: int) -> dict[str, Any]:
    """Compile a side of a contest and run it once; how many bytes a call moves, and what it said of itself.

    Args:
        key: names it to :func:`measure`.
        side: of ``SIDES``.
        sizes: for its builder.
        target_bytes: of inputs that one program goes through.
    """
    enable_compile_cache()
    with _Messages() as messages:
        found: Side = SIDES[side](**sizes)
        first = jax.block_until_ready(found.inputs(jax.random.key(0)))
        count = prepared.num_sets(array_bytes(first), target_bytes)
        sets = [first, *(found.inputs(jax.random.key(1 + index)) for index in range(count - 1))]
        call = jax.jit(found.call)  # traced and lowered once, however many sets there are
        program = jax.jit(lambda sets: [call(*one) for one in sets])
        began = time.perf_counter()
        compiled = program.lower(sets).compile()
        compile_s = time.perf_counter() - began
        prepared.keep(key, prepared.Program(lambda: compiled(sets), jax.block_until_ready, num_calls=count))
        out = call(*first)
        checked = {} if found.expected is None else {"error_of_result": relative_error(out, jax.jit(found.expected)(*first))}
    log = {"log": messages.lines} if messages.lines else {}
    return {"num_bytes": array_bytes((first, out)), "num_sets": count, "compile_s": compile_s, **checked, **log, **found.notes}


def relative_error(actual: Any, expected: Any) -> float:
    """Of two trees of arrays the largest relative Frobenius error; infinite where something is not finite."""
    errors = []
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        error = jnp.linalg.norm((one - other).reshape(-1)) / jnp.maximum(jnp.linalg.norm(other.reshape(-1)), 1e-30)
        errors.append(float(error) if jnp.isfinite(one).all() else float("inf"))
    return max(errors)


def drop() -> None:
    """Let go of every program."""
    prepared.drop()
    jax.clear_caches()


def array_bytes(arrays: Any) -> int:
    """Of a tree of arrays; two codes of four bits are a byte."""
    return sum(leaf.size // 2 if str(leaf.dtype) in ("int4", "uint4") else leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def copy_bandwidth(num_bytes: int, num_samples: int) -> dict[str, Any]:
    """Bytes a second, samples: of copying an array (read and written ones counted), and of reading one."""
    source = jnp.ones(num_bytes // 4, jnp.int32)
    flip = jax.jit(lambda x: x ^ 1)
    flip(source).block_until_ready()
    prepared.keep("copy", prepared.Program(lambda: flip(source), jax.block_until_ready, num_calls=1))
    seconds = measure("copy", num_samples, 0.05)
    prepared.drop()
    read = device_bandwidth(jax.devices()[:1], num_passes=num_samples, num_bytes=num_bytes)
    return {"copy_bytes_per_s": [2 * source.nbytes / one for one in seconds], "read_bytes_per_s": list(read.samples)}


def matmul_seconds(dtype: str, size: int, num_samples: int) -> list[float]:
    """Samples of a square product of XLA's, the second factor as checkpoints hold it."""
    a, b = (jax.random.normal(jax.random.key(index), (size, size), jnp.float32) for index in range(2))
    a, b = (((jnp.clip(x, -4, 4) * 31).astype(dtype) if dtype == "int8" else x.astype(dtype)) for x in (a, b))
    product = jax.jit(lambda a, b: jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=_out_dtype(dtype)))
    prepared.keep("matmul", prepared.Program(lambda: product(a, b), jax.block_until_ready, num_calls=1))
    seconds = measure("matmul", num_samples, 0.05)
    prepared.drop()
    return seconds


def _out_dtype(dtype: str) -> Any:
    return jnp.int32 if dtype == "int8" else jnp.bfloat16


class _Messages(logging.Handler):
    """What the kernels log while it is entered: which implementation they chose, and why."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> "_Messages":
        log = logging.getLogger("pallas_kernels")
        self._level = log.level
        log.setLevel(logging.INFO)
        log.addHandler(self)
        return self

    def __exit__(self, *_) -> None:
        log = logging.getLogger("pallas_kernels")
        log.removeHandler(self)
        log.setLevel(self._level)
