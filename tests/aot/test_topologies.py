"""Names of accelerators, and what is said where one cannot be compiled for."""
import jax
import pytest
from jax.experimental import topologies

from sharding_rules import MeshError
from tpllm.aot.topologies import GPUS, TPUS, accelerator_mesh, describe_devices
from tpllm.errors import ConfigError


@pytest.mark.parametrize("name", ["a100:8", "v5e2x2", "", "cpu:4"])
def test_an_unknown_accelerator_is_refused_and_the_known_ones_named(name):
    with pytest.raises(ConfigError, match=r"unknown accelerator.*write 'h200:8' or 'v5e:2x4'") as error:
        describe_devices(name)
    assert all(known in str(error.value) for known in GPUS + TPUS)


@pytest.mark.parametrize("name", ["h200", "h200:", "h200:0", "h200:2x2", "h200:-1"])
def test_a_number_of_gpus_that_is_none_is_refused(name):
    with pytest.raises(ConfigError, match="whole number of at least 1, as in 'h200:8'"):
        describe_devices(name)


@pytest.mark.parametrize(("name", "package"), [("h200:4", "jax-cuda13-pjrt"), ("v6e:2x2", "libtpu")])
def test_a_missing_compiler_is_named_with_its_packages(name, package, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such plugin")
    monkeypatch.setattr(topologies, "get_topology_desc", fail)
    with pytest.raises(ConfigError, match=f"no such plugin.*{package}"):
        describe_devices(name)


@pytest.mark.aot
def test_a_mesh_of_h200s_lies_over_as_many_as_are_asked_for():
    mesh = accelerator_mesh("h200:8", {"dp": 2, "tp": 4})
    assert dict(mesh.shape) == {"dp": 2, "tp": 4}
    assert {device.platform for device in mesh.devices.flat} == {"gpu"}
    assert {device.device_kind for device in mesh.devices.flat} == {"NVIDIA H200"}
    with pytest.raises(MeshError, match="needs 8 devices but 4"):
        accelerator_mesh("h200:4", {"tp": 8})


@pytest.mark.aot
@pytest.mark.parametrize(("name", "kind"), [("v5e:2x4", "TPU v5 lite"), ("v6e:2x4", "TPU v6 lite")])
def test_a_slice_of_tpus_has_the_chips_of_its_shape(name, kind):
    devices = describe_devices(name)
    assert len(devices) == 8
    assert {device.device_kind for device in devices} == {kind}
    assert jax.default_backend() == "cpu"


@pytest.mark.aot
def test_a_slice_of_a_shape_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"no compiler for 'v5e:3x5'.*shape"):
        describe_devices("v5e:3x5")
