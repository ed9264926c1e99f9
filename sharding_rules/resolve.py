"""From logical axes to a ``NamedSharding``."""
from collections.abc import Sequence

from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding_rules.rules import Rules


class ShardingError(ValueError):
    """An array whose dims the mesh cannot cut evenly."""


def partition_spec(axes: Sequence[str | None], rules: Rules, mesh: Mesh) -> P:
    """The ``PartitionSpec`` of an array with these logical axes; mesh axes that ``mesh`` lacks count as replicated."""
    names = (rules.mesh_axis(axis) for axis in axes)
    return P(*(name if name in mesh.shape else None for name in names))


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
    spec = partition_spec(axes, rules, mesh)
    for dim, (axis, mesh_axis) in enumerate(zip(axes, spec, strict=True)):
        if shape is None or mesh_axis is None:
            continue
        parts = mesh.shape[mesh_axis]
        if shape[dim] % parts:
            raise ShardingError(f"{name}: dim {dim} ({axis!r}) of shape {tuple(shape)} is {shape[dim]}, which mesh axis {mesh_axis!r} of "
                                f"size {parts} does not divide; choose a size that divides {shape[dim]}, or replicate {axis!r}")
    return NamedSharding(mesh, spec)
