"""Device meshes from what a user writes: ``"tp=4"``, ``{"dp": 2, "tp": 4}``, or a ``jax.sharding.Mesh``."""
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

MESH_AXES = ("dp", "ep", "tp")
ALWAYS = ("dp", "tp")


class MeshError(ValueError):
    """A mesh that cannot be built from what was asked for or from the devices there are."""


def parse_mesh(text: str | Mapping[str, int]) -> dict[str, int]:
    """``"dp=2,tp=4"`` or a mapping, as an ordered dict of axis sizes.

    Raises:
        MeshError: a malformed entry, an unknown axis, or a size below 1.
    """
    if isinstance(text, Mapping):
        pairs = list(text.items())
    else:
        pairs = [part.partition("=")[::2] for part in str(text).replace(" ", "").split(",")]
    sizes: dict[str, int] = {}
    for axis, size in pairs:
        if axis not in MESH_AXES:
            raise MeshError(f"mesh {text!r}: unknown axis {axis!r}; known: {', '.join(MESH_AXES)}; write it as 'tp=4' or 'dp=2,tp=4'")
        if axis in sizes:
            raise MeshError(f"mesh {text!r}: axis {axis!r} is given twice")
        try:
            sizes[axis] = int(size)
            if isinstance(size, bool) or (isinstance(size, float) and size != sizes[axis]):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise MeshError(f"mesh {text!r}: the size of {axis!r} is {size!r}; give a whole number, as in 'tp=4'") from None
        if sizes[axis] < 1:
            raise MeshError(f"mesh {text!r}: the size of {axis!r} is {sizes[axis]}; the least is 1")
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the first devices, partitioned automatically by XLA: ``dp`` and ``tp`` (size 1 where not given), and ``ep`` between where given.

    Args:
        sizes: axis name -> number of devices along it.
        devices: the devices to use; by default all local ones.

    Raises:
        MeshError: the mesh asks for more devices than there are.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    axes = tuple(axis for axis in MESH_AXES if axis in ALWAYS or axis in sizes)
    shape = tuple(sizes.get(axis, 1) for axis in axes)
    needed = math.prod(shape)
    if needed > len(devices):
        hint = (f"; on a CPU, JAX_NUM_CPU_DEVICES={needed} in the environment gives that many virtual ones"
                if devices[0].platform == "cpu" else "")
        raise MeshError(f"mesh {_sizes_text(sizes)} needs {needed} devices but {len(devices)} "
                        f"{'is' if len(devices) == 1 else 'are'} available ({devices[0].platform}); ask for a smaller mesh{hint}")
    return Mesh(np.array(devices[:needed]).reshape(shape), axes, axis_types=(AxisType.Auto,) * len(axes))


def mesh_text(mesh: Mesh) -> str:
    """A mesh as the user would write it: ``"dp=2,tp=4"``; axes of size 1 are left out."""
    return _sizes_text({axis: size for axis, size in mesh.shape.items() if size > 1}) or "tp=1"


def _sizes_text(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())
