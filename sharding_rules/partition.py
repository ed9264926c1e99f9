"""A mesh and its rules together: what a model needs to place its arrays."""
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from sharding_rules.presets import REPLICATED
from sharding_rules.resolve import num_parts, partition_spec, present_axes, resolve
from sharding_rules.rules import Rules


@dataclasses.dataclass(frozen=True)
class Partition:
    """How one model lies on one mesh. Hashable, so it can be part of a static configuration.

    Inside a ``jax.shard_map`` that is manual over axes which the rules do not name, such as a pipeline's, the methods speak of the rest of the mesh.

    Attributes:
        mesh: the mesh; None for the first device that there is (``ONE_DEVICE``), which is looked up when it is asked for.
        rules: logical axes -> mesh axes.
    """

    mesh: Mesh | None = None
    rules: Rules = REPLICATED

    @property
    def axis_sizes(self) -> Mapping[str, int]:
        """The mesh's axes and their sizes."""
        return {} if self.mesh is None else self.mesh.shape

    @property
    def device(self) -> jax.Device:
        """The first device."""
        return jax.local_devices()[0] if self.mesh is None else self.mesh.devices.flat[0]

    @property
    def num_devices(self) -> int:
        """How many devices there are."""
        return num_parts(tuple(self.axis_sizes), self.axis_sizes)

    @property
    def platform(self) -> str:
        """The platform of the devices, one of ``"cpu"``, ``"gpu"``, ``"tpu"``."""
        return self.device.platform

    def size(self, logical: str | None) -> int:
        """Into how many parts a logical axis is cut (1 where it is replicated)."""
        return num_parts(self.rules.mesh_axis(logical), self.axis_sizes)

    def spec(self, axes: Sequence[str | None]) -> P:
        """The ``PartitionSpec`` of an array with these logical axes."""
        return partition_spec(axes, self.rules, self.axis_sizes)

    def sharding(self, axes: Sequence[str | None], *, shape: Sequence[int] | None = None, name: str = "array") -> Sharding:
        """The sharding of an array with these logical axes; see :func:`sharding_rules.resolve`."""
        return SingleDeviceSharding(self.device) if self.mesh is None else resolve(axes, self.rules, self.mesh, shape=shape, name=name)

    def constrain(self, x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
        """``x`` with its layout fixed inside a jitted program."""
        if self.mesh is None:
            return x
        context = jax.sharding.get_abstract_mesh()
        mesh = context if context.manual_axes else self.mesh
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, self.spec(axes)))

    def shard_map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """``function`` run by each device on its shards, as ``jax.shard_map`` does; as it is where there is one device.

        Args:
            function: of a shard's arrays.
            in_specs, out_specs: a ``PartitionSpec`` (:meth:`spec`) for each array, in trees like those of arguments and results.
        """
        manual = jax.sharding.get_abstract_mesh().manual_axes
        names = {name for name in self.axis_sizes if name not in manual}
        if num_parts(tuple(names), self.axis_sizes) == 1:
            return function
        mesh_options = {"axis_names": names} if manual else {"mesh": self.mesh}  # the context's mesh is the only one that nests
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False, **mesh_options)

    def shard_index(self, logical: str) -> jax.Array | int:
        """Inside :meth:`shard_map`: which of the parts of a logical axis this device holds."""
        return jax.lax.axis_index(present_axes(self.rules.mesh_axis(logical), self.axis_sizes)) if self.size(logical) > 1 else 0

    def sum_shards(self, x: Any, logical: str | None) -> Any:
        """Inside :meth:`shard_map`: the sum, or a tree of sums, over the parts of a logical axis."""
        return jax.lax.psum(x, present_axes(self.rules.mesh_axis(logical), self.axis_sizes)) if self.size(logical) > 1 else x


ONE_DEVICE = Partition()
"""What a model that is fitted to no mesh lies on."""
