"""From logical axes to shardings."""
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sharding_rules import DATA_TENSOR, PRESETS, REPLICATED, TENSOR, Partition, Rules, ShardingError, make_mesh, resolve
from sharding_rules.axes import BATCH, EMBED, EXPERT_MLP, EXPERTS, HEADS, KV_HEADS, LOGICAL_AXES, MLP, VOCAB

SPLIT = {VOCAB: "tp", HEADS: "tp", KV_HEADS: "tp", MLP: "tp", EXPERTS: "ep", EXPERT_MLP: ("ep", "tp")}


@pytest.mark.parametrize(("preset", "split"), [("replicated", {}), ("tensor", SPLIT), ("data_tensor", {**SPLIT, BATCH: "dp"})])
def test_a_preset_splits_these_axes_and_no_other(preset, split):
    assert {axis: PRESETS[preset].mesh_axis(axis) for axis in LOGICAL_AXES} == {axis: split.get(axis) for axis in LOGICAL_AXES}


def test_a_split_dim_lies_over_its_mesh_axis_and_the_rest_is_replicated():
    sharding = resolve((HEADS, EMBED, None), TENSOR, make_mesh({"dp": 2, "tp": 4}), shape=(8, 3, 5))
    assert sharding.spec == P("tp", None, None)
    assert sharding.shard_shape((8, 3, 5)) == (2, 3, 5)


def test_a_mesh_axis_that_the_mesh_lacks_counts_as_replicated():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tp",))
    assert resolve((BATCH, HEADS), DATA_TENSOR, mesh).spec == P(None, "tp")
    assert Partition(mesh, DATA_TENSOR).size(BATCH) == 1


def test_a_dim_may_lie_over_several_mesh_axes_as_far_as_the_mesh_has_them():
    mesh = make_mesh({"ep": 2, "tp": 4})
    assert (mesh.axis_names, make_mesh({"tp": 4}).axis_names) == (("dp", "ep", "tp"), ("dp", "tp"))
    sharding = resolve((EXPERT_MLP, EMBED), TENSOR, mesh, shape=(24, 3))
    assert (sharding.spec, sharding.shard_shape((24, 3)), Partition(mesh, TENSOR).size(EXPERT_MLP)) == (P(("ep", "tp"), None), (3, 3), 8)
    assert resolve((EXPERT_MLP, EMBED), TENSOR, make_mesh({"tp": 4})).spec == P("tp", None)
    with pytest.raises(ShardingError, match="is 12, which mesh axis"):
        resolve((EXPERT_MLP, EMBED), TENSOR, mesh, shape=(12, 3))


def test_a_dim_that_the_mesh_does_not_divide_is_refused_with_the_parameter_named():
    with pytest.raises(ShardingError, match=r"layers\.3\.mlp\.gate: dim 0 \('mlp'\) of shape \(10, 7\) is 10, which mesh axis 'tp' of size 4"):
        resolve((MLP, EMBED), TENSOR, make_mesh({"tp": 4}), shape=(10, 7), name="layers.3.mlp.gate")


def test_rules_refuse_an_unknown_axis_and_one_named_twice():
    with pytest.raises(ValueError, match="unknown logical axis 'width'; known: vocab"):
        Rules((("width", "tp"),))
    with pytest.raises(ValueError, match="named twice"):
        Rules(((MLP, "tp"), (MLP, "dp")))


def test_axes_can_be_taken_out_of_rules():
    rules = TENSOR.without(HEADS, KV_HEADS)
    assert (rules.mesh_axis(HEADS), rules.mesh_axis(KV_HEADS), rules.mesh_axis(MLP)) == (None, None, "tp")
    assert TENSOR.without(*SPLIT) == REPLICATED


def test_a_partition_is_hashable_and_constrains_inside_jit():
    partition = Partition(make_mesh({"tp": 4}), TENSOR)
    assert hash(partition) == hash(Partition(make_mesh({"tp": 4}), TENSOR))
    assert (partition.size(MLP), partition.size(EMBED), partition.platform) == (4, 1, "cpu")
    out = jax.jit(lambda x: partition.constrain(x * 2, (None, MLP)))(np.ones((3, 8), np.float32))
    assert out.sharding.shard_shape(out.shape) == (3, 2)
