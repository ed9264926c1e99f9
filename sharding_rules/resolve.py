"""Makes a ``NamedSharding`` of logical axes."""
import math
from collections.abc import Mapping, Sequence

from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding_rules.rules import Rules


class ShardingError(ValueError):
    """An array whose dims the mesh cannot cut evenly."""


def partition_spec(axes: Sequence[str | None], rules: Rules, sizes: Mapping[str, int]) -> P:
    """The ``PartitionSpec`` of an array with these logical axes; mesh axes that are not among ``sizes`` count as replicated."""
    return P(*(present_axes(rules.mesh_axis(axis), sizes) for axis in axes))


def present_axes(names: str | tuple[str, ...] | None, sizes: Mapping[str, int]) -> str | tuple[str, ...] | None:
    """Those of some mesh axes that a mesh of these ``sizes`` has; None where it has none."""
    if isinstance(names, tuple):
        found = tuple(name for name in names if name in sizes)
        return found if len(found) > 1 else next(iter(found), None)
    return names if names in sizes else None


def num_parts(names: str | tuple[str, ...] | None, sizes: Mapping[str, int]) -> int:
    """Into how many parts some mesh axes cut a dim."""
    return math.prod(sizes.get(name, 1) for name in (names if isinstance(names, tuple) else (names,)))


def resolve(axes: Sequence[str | None], rules: Rules, mesh: Mesh, *, shape: Sequence[int] | None = None,
            name: str = "array") -> NamedSharding:
    """The sharding of one array.

    Args:
        axes: a logical axis (or None) for each dim.
        rules: logical axis -> mesh axis.
        mesh: the device mesh.
        shape: the array's shape; when given, every split dim is checked to divide evenly.
        name: how an error calls the array.

    Raises:
        ShardingError: a dim that its mesh axis does not divide; it names the array, the dim and both sizes.
    """
    spec = partition_spec(axes, rules, mesh.shape)
    for dim, (axis, mesh_axis) in enumerate(zip(axes, spec, strict=True)):
        if shape is None or mesh_axis is None:
            continue
        parts = num_parts(mesh_axis, mesh.shape)
        if shape[dim] % parts:
            raise ShardingError(f"{name}: dim {dim} ({axis!r}) of shape {tuple(shape)} is {shape[dim]}, which mesh axis {mesh_axis!r} of "
                                f"size {parts} does not divide; choose a size that divides {shape[dim]}, or replicate {axis!r}")
    return NamedSharding(mesh, spec)
