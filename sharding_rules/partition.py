"""A mesh and its rules together: what a model needs to place its arrays."""
import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding_rules.resolve import num_parts, partition_spec, resolve
from sharding_rules.rules import Rules


@dataclasses.dataclass(frozen=True)
class Partition:
    """How one model lies on one mesh. Hashable, so it can be part of a static configuration."""

    mesh: Mesh
    rules: Rules

    @property
    def platform(self) -> str:
        """The platform of the mesh's devices, one of ``"cpu"``, ``"gpu"``, ``"tpu"``."""
        return self.mesh.devices.flat[0].platform

    def size(self, logical: str) -> int:
        """Into how many parts a logical axis is cut (1 where it is replicated)."""
        return num_parts(self.rules.mesh_axis(logical), self.mesh)

    def spec(self, axes: Sequence[str | None]) -> P:
        """The ``PartitionSpec`` of an array with these logical axes."""
        return partition_spec(axes, self.rules, self.mesh)

    def sharding(self, axes: Sequence[str | None], *, shape: Sequence[int] | None = None, name: str = "array") -> NamedSharding:
        """The ``NamedSharding`` of an array with these logical axes; see :func:`sharding_rules.resolve`."""
        return resolve(axes, self.rules, self.mesh, shape=shape, name=name)

    def constrain(self, x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
        """``x`` with its layout fixed inside a jitted program."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes))
