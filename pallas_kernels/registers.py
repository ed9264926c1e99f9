"""What a warp group of a GPU moves between memory and its registers, as each version of jax spells it."""
import inspect

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
NO_INDEX = () if _INDEX is None or _INDEX.default is not inspect.Parameter.empty else ((),)
"""What ``plgpu.load`` takes after a reference: jax 0.10 asks for an index, 0.11 warns of one, 0.12 takes none."""


def load_registers(ref, layout: plgpu.Layout, *, is_optimized: bool = False) -> jax.Array:
    """All that a reference holds.

    Args:
        layout: how it lies in the registers.
        is_optimized: whether the compiler refuses a load that is slowed down by conflicts of banks.
    """
    return plgpu.load(ref, *NO_INDEX, layout=layout, optimized=is_optimized)


def store_registers(ref, value: jax.Array) -> None:
    """Write to all of a reference, with conflicts of banks where they cannot be helped; an assignment refuses these since jax 0.12."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value
