"""Pallas's interpreter of GPU kernels, made quick enough for tests."""
import threading

import jax
from jax._src.pallas.mosaic.interpret import thread_map

OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class CompiledOnce:
    """Stands in for the function that a simulated warp group runs: compiled once a kernel, where the interpreter compiles it for each warp group of
    each block of the grid.
    """

    def __init__(self):
        self._lock, self._compiled = threading.Lock(), {}

    def __call__(self, jaxpr, consts, *args):
        with self._lock:
            if id(jaxpr) not in self._compiled:
                run = jax.jit(lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args) and None)
                self._compiled[id(jaxpr)] = jaxpr, run.lower(consts, *args).compile(OPTIONS)
        self._compiled[id(jaxpr)][1](consts, *args)


def install(monkeypatch) -> None:
    """For one test."""
    monkeypatch.setattr(thread_map, "_run_jaxpr", CompiledOnce())
