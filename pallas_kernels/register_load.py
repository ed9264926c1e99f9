"""A load from a GPU's memory into registers, as each version of jax spells it."""
import inspect

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
NO_INDEX = () if _INDEX is None or _INDEX.default is not inspect.Parameter.empty else ((),)
"""What ``plgpu.load`` takes after a reference: jax 0.10 asks for an index, 0.11 warns of one, 0.12 takes none."""


def load_registers(ref, layout: plgpu.Layout, *, is_optimized: bool = False) -> jax.Array:
    """All that a reference holds.

    Args:
        layout: how it lies in the registers of a warp group.
        is_optimized: whether a load that takes more than one instruction a vector is an error of the compiler.
    """
    return plgpu.load(ref, *NO_INDEX, layout=layout, optimized=is_optimized)
