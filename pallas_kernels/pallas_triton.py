"""Pallas' back end for Triton, which is to be taken out of jax: imported only where a device's kernels need it, so that nothing else misses it."""
from types import ModuleType

import jax


def load_triton() -> ModuleType:
    """The module of its parameters, loads and stores.

    Raises:
        ImportError: this jax has none.
    """
    from jax.experimental.pallas import triton
    return triton


def refusal() -> str | None:
    """Why its kernels cannot run, for :func:`pallas_kernels.implementations.pick`; None where they can."""
    try:
        load_triton()
    except ImportError as error:
        return f"needs Pallas' back end for Triton, which jax {jax.__version__} does not have ({error})"
    return None
