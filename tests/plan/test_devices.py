"""Topologies and how their devices are joined."""
import pytest

from tpllm.errors import ConfigError
from tpllm.plan.devices import LIMITS, find_devices, limits_of, wiring


def test_a_line_of_a_slice_has_one_link_and_a_closed_side_two(places):
    slice_4x4, ring = places("TPU v5 lite", 4, 4), places("TPU v5 lite", 16, 16)
    link = LIMITS["TPU v5 lite"].link_bytes_per_s
    assert wiring(slice_4x4[:4], slice_4x4) == (link, 3)
    assert wiring(slice_4x4, slice_4x4) == (2 * link, 6)
    assert wiring(ring[:16], ring) == (2 * link, 8)
    assert wiring(ring, ring) == (4 * link, 16)
    assert wiring(ring[:8], ring) == (link, 7)


def test_three_sides_of_a_v5p(places):
    cube = places("TPU v5", 4, 4, 4)
    assert wiring(cube, cube) == (6 * LIMITS["TPU v5"].link_bytes_per_s, 6)


def test_beside_a_switch_every_group_has_the_whole_port(places):
    gpus = places("NVIDIA H200", 8)
    assert wiring(gpus[:2], gpus) == (450e9, 1)
    assert wiring(gpus, gpus) == (450e9, 3)


def test_cpu_devices_are_this_machines_own(num_devices):
    assert len(find_devices(f"cpu:{num_devices}")) == num_devices
    assert limits_of(find_devices("cpu:1")[0]).memory_bytes is None


@pytest.mark.parametrize("name", ["cpu", "cpu:", "cpu:0", "cpu:2x2", "cpu:2000", "cpu:-1"])
def test_a_number_of_cpu_devices_that_is_none_is_refused(name):
    with pytest.raises(ConfigError, match="whole number from 1 to 1024, as in 'cpu:8'"):
        find_devices(name)


def test_more_cpu_devices_than_jax_has_made_are_refused_with_the_variable_to_set(num_devices):
    with pytest.raises(ConfigError, match=rf"has made {num_devices} CPU devices.*JAX_NUM_CPU_DEVICES={num_devices + 1}"):
        find_devices(f"cpu:{num_devices + 1}")


def test_a_device_whose_limits_are_not_known_is_refused(places):
    with pytest.raises(ConfigError, match=r"no plan is made for a TPU v2.*known: NVIDIA H100"):
        limits_of(places("TPU v2", 2)[0])
