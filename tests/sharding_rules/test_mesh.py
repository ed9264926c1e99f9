"""Meshes from what a user writes."""
import jax
import pytest

from sharding_rules import MeshError, make_mesh, mesh_text, parse_mesh


@pytest.mark.parametrize(("text", "sizes"), [
    ("tp=4", {"tp": 4}), ("dp=2,tp=4", {"dp": 2, "tp": 4}), (" tp = 2 ", {"tp": 2}), ({"tp": 8}, {"tp": 8}), ({}, {})])
def test_a_mesh_is_written_as_text_or_as_a_mapping(text, sizes):
    assert parse_mesh(text) == sizes


@pytest.mark.parametrize(("text", "message"), [
    ("xp=4", "unknown axis 'xp'; known: dp, ep, tp"), ("", "unknown axis ''"), ("4", "unknown axis '4'"),
    ("tp=2,tp=4", "axis 'tp' is given twice"), ("tp=", "the size of 'tp' is ''"), ("tp=two", "the size of 'tp' is 'two'; give a whole number"),
    ("tp=0", "the size of 'tp' is 0; the least is 1"), ("tp=-2", "the size of 'tp' is -2"), ({"tp": None}, "the size of 'tp' is None"),
    ({"tp": True}, "the size of 'tp' is True; give a whole number"), ({"tp": 2.5}, "the size of 'tp' is 2.5"), ({"tp": float("inf")}, "is inf")])
def test_a_malformed_mesh_is_refused_with_its_value(text, message):
    with pytest.raises(MeshError, match=message):
        parse_mesh(text)


def test_a_mesh_larger_than_the_devices_is_refused_with_both_numbers(num_devices):
    with pytest.raises(MeshError, match=rf"mesh dp=2,tp=8 needs 16 devices but {num_devices} are available \(cpu\).*JAX_NUM_CPU_DEVICES=16"):
        make_mesh({"dp": 2, "tp": 8})
    with pytest.raises(MeshError, match="needs 2 devices but 1 is available"):
        make_mesh({"tp": 2}, jax.devices()[:1])


def test_a_mesh_takes_the_first_devices_and_leaves_partitioning_to_xla():
    mesh = make_mesh({"tp": 2, "dp": 2})
    assert dict(mesh.shape) == {"dp": 2, "tp": 2}
    assert list(mesh.devices.flat) == jax.devices()[:4]
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize("text", ["tp=1", "tp=4", "dp=2", "dp=2,tp=2"])
def test_a_mesh_reads_as_it_was_written(text):
    assert mesh_text(make_mesh(parse_mesh(text))) == text
