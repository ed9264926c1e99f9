"""Logical array axes, and how they lie on a device mesh.

A model names the axes of its arrays (``"heads"``, ``"mlp"``, ...); a :class:`Rules` maps each name to a mesh axis; :func:`resolve` turns
the two into a ``NamedSharding``. This package knows nothing of any model.
"""
from sharding_rules.mesh import MeshError, make_mesh, mesh_text, parse_mesh
from sharding_rules.partition import ONE_DEVICE, Partition
from sharding_rules.presets import DATA_TENSOR, PRESETS, REPLICATED, TENSOR
from sharding_rules.resolve import ShardingError, resolve
from sharding_rules.rules import Rules

__all__ = ["DATA_TENSOR", "ONE_DEVICE", "PRESETS", "REPLICATED", "TENSOR", "MeshError", "Partition", "Rules", "ShardingError",
           "make_mesh", "mesh_text", "parse_mesh", "resolve"]
