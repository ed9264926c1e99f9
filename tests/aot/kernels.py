"""Kernels compiled for one device of an accelerator."""
import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.tiling import Device, device_of
from tpllm.aot.report import ProgramFacts, compile_lowered
from tpllm.aot.topologies import accelerator_mesh

H200, TPUS = "h200:1", ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


def implementation_for(accelerator: str) -> str:
    """Our kernel's name."""
    return "mosaic_gpu" if accelerator == H200 else "mosaic_tpu"


@functools.cache
def _mesh(accelerator: str) -> jax.sharding.Mesh:
    return accelerator_mesh(accelerator, {"tp": 1})


def device(accelerator: str) -> Device:
    """What kernels must know of it."""
    return device_of(_mesh(accelerator).devices.flat[0])


def compile_kernel(accelerator: str, function: Callable[..., Any], *arrays: Any, donated: tuple[int, ...] = ()) -> ProgramFacts:
    """``function`` of arrays of these shapes, lowered and compiled; it may write to the ``donated`` ones."""
    mesh = _mesh(accelerator)
    sharding = jax.NamedSharding(mesh, jax.P())
    abstract = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), arrays)
    with jax.set_mesh(mesh):
        return compile_lowered(jax.jit(function, out_shardings=sharding, donate_argnums=donated).lower(*abstract))
