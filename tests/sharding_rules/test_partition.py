"""A partition's shardings, sums and ``shard_map``: on a mesh, on one device, and inside regions that are manual already."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from sharding_rules import DATA_TENSOR, ONE_DEVICE, Partition, make_mesh
from sharding_rules.axes import BATCH, EMBED, EXPERT_MLP, MLP

X_BD = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)


def totals(partition, x_BF):
    """(the sum of each row, whichever device holds a part of it; the part of the last dim that each row's device holds)."""
    def on_shard(x):
        return partition.sum_shards(jnp.sum(x, axis=-1), MLP), jnp.zeros(x.shape, jnp.int32) + partition.shard_index(MLP)
    spec = partition.spec((BATCH, MLP))
    return partition.shard_map(on_shard, (spec,), (partition.spec((BATCH,)), spec))(x_BF)


def test_one_device_is_a_partition_that_cuts_nothing():
    assert (ONE_DEVICE.size(MLP), ONE_DEVICE.num_devices, ONE_DEVICE.spec((BATCH, None))) == (1, 1, P(None, None))
    assert ONE_DEVICE.sharding((BATCH,)) == SingleDeviceSharding(jax.local_devices()[0])
    assert (ONE_DEVICE.device, ONE_DEVICE.platform) == (jax.local_devices()[0], "cpu")
    assert ONE_DEVICE.constrain(X_BD, (BATCH, EMBED)) is X_BD
    assert ONE_DEVICE.shard_map(totals, (), ()) is totals
    assert Partition() == ONE_DEVICE
    sums, parts = totals(ONE_DEVICE, X_BD)
    np.testing.assert_array_equal(sums, X_BD.sum(1))
    assert not parts.any()


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"dp": 2, "tp": 2}, {"dp": 4, "tp": 1}], ids=str)
def test_each_device_runs_the_function_on_its_shard_and_sums_go_over_the_parts(sizes):
    sums, parts = jax.jit(functools.partial(totals, Partition(make_mesh(sizes), DATA_TENSOR)))(X_BD)
    np.testing.assert_array_equal(sums, X_BD.sum(1))
    np.testing.assert_array_equal(parts, np.broadcast_to(np.arange(6) // (6 // sizes["tp"]), X_BD.shape))


def test_a_sum_over_an_axis_of_several_mesh_axes_leaves_out_those_that_the_mesh_lacks():
    for sizes in ({"tp": 2}, {"ep": 2, "tp": 2}, {"ep": 2, "tp": 1}):
        partition = Partition(make_mesh(sizes), DATA_TENSOR)
        run = partition.shard_map(lambda x, own=partition: own.sum_shards(jnp.sum(x), EXPERT_MLP), (partition.spec((EXPERT_MLP, None)),), P())
        assert run(X_BD) == X_BD.sum()


@pytest.mark.parametrize("sizes", [{"pp": 2, "dp": 2, "tp": 2}, {"pp": 2, "dp": 1, "tp": 1}], ids=str)
def test_inside_a_manual_axis_the_rest_of_the_mesh_is_cut(sizes):
    mesh = Mesh(np.array(jax.devices()[:int(np.prod(list(sizes.values())))]).reshape(*sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3)
    partition, stacked = Partition(mesh, DATA_TENSOR), np.stack([X_BD, -2 * X_BD])

    def stage(x_1BD):
        scaled_BD = x_1BD[0] * (1 + jax.lax.axis_index("pp")).astype(jnp.float32)
        return jax.tree.map(lambda x: x[None], totals(partition, partition.constrain(scaled_BD, (BATCH, MLP))))
    run = jax.jit(jax.shard_map(stage, mesh=mesh, in_specs=P("pp"), out_specs=P("pp"), axis_names={"pp"}, check_vma=False))
    sums, parts = run(stacked)
    np.testing.assert_array_equal(sums, stacked.sum(-1) * [[1], [2]])
    np.testing.assert_array_equal(parts, np.broadcast_to(np.arange(6) // (6 // sizes["tp"]), parts.shape))


def test_where_all_axes_are_manual_arrays_are_shards_already():
    partition = Partition(make_mesh({"tp": 2}), DATA_TENSOR)
    run = partition.shard_map(lambda x: partition.shard_map(lambda x: x * x.shape[1], (), ())(x), (P(None, "tp"),), P(None, "tp"))
    np.testing.assert_array_equal(run(X_BD), 3 * X_BD)
