"""A jax without Pallas' back end for Triton, as a later one is to be."""
import sys

from jax.experimental import pallas

from pallas_kernels.quant_matmul import jax_triton


def install(monkeypatch) -> None:
    """For one test; jax-triton is hidden, too."""
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.delattr(pallas, "triton", raising=False)
    monkeypatch.setattr(jax_triton, "refusal", lambda: "needs jax-triton")
