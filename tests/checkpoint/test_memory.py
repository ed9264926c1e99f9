"""What a model needs, what is free, and the refusal when they do not meet."""
import types

import jax
import numpy as np
import pytest

from sharding_rules import DATA_TENSOR, TENSOR, make_mesh
from tpllm.checkpoint import memory
from tpllm.checkpoint.folder import open_checkpoint
from tpllm.checkpoint.load import load_params
from tpllm.checkpoint.memory import GIB, check_memory, needed_bytes
from tpllm.environment.memory import cgroup_free_bytes, host_free_bytes
from tpllm.errors import MemoryNeedError
from tpllm.model.partition import fit_to_mesh


@pytest.mark.parametrize("sizes", [{"tp": 1}, {"tp": 8}, {"dp": 2, "tp": 4}])
def test_the_need_is_what_a_load_then_holds(make_checkpoint, sizes):
    folder, _ = make_checkpoint()
    checkpoint = open_checkpoint(folder)
    config = fit_to_mesh(checkpoint.config, make_mesh(sizes), DATA_TENSOR)
    needed, largest = needed_bytes(config, dtype=np.float32, cache_bytes_per_device=1000)
    params = load_params(checkpoint, config, dtype=np.float32)
    buffers = {shard.data.unsafe_buffer_pointer(): shard.data.nbytes for array in jax.tree.leaves(params) for shard in array.addressable_shards}
    assert needed.keys() == set(config.partition.mesh.devices.flat)
    assert sum(needed.values()) == sum(buffers.values()) + 1000 * len(needed)
    assert largest == config.padded_vocab_size * config.hidden_size * 4


def test_a_model_without_a_mesh_needs_its_bytes_on_one_device(make_checkpoint):
    folder, tensors = make_checkpoint()
    needed, _ = needed_bytes(open_checkpoint(folder).config, dtype=np.float16, cache_bytes_per_device=7)
    assert needed == {jax.local_devices()[0]: sum(value.size for value in tensors.values()) * 2 + 7}


def test_virtual_devices_share_the_hosts_memory(monkeypatch):
    devices = jax.devices()
    monkeypatch.setattr(memory, "host_free_bytes", lambda: 9 * GIB)
    check_memory(dict.fromkeys(devices, GIB), staging_bytes=GIB)
    with pytest.raises(MemoryNeedError, match=r"needs 9.50 GiB of host memory, 9.00 GiB are free. Lower kv_cache_tokens"):
        check_memory(dict.fromkeys(devices, GIB), staging_bytes=GIB * 3 // 2)


def test_an_accelerator_is_asked_for_its_own_memory(monkeypatch):
    class Accelerator(types.SimpleNamespace):
        __hash__ = object.__hash__
        def __str__(self):
            return self.name
    full = Accelerator(name="gpu:1", platform="gpu", memory_stats=lambda: {"bytes_limit": 16 * GIB, "bytes_in_use": 4 * GIB})
    silent = Accelerator(name="gpu:0", platform="gpu", memory_stats=lambda: None)
    monkeypatch.setattr(memory, "host_free_bytes", lambda: GIB)
    check_memory({silent: 99 * GIB, full: 12 * GIB}, staging_bytes=GIB)
    with pytest.raises(MemoryNeedError, match=r"needs 13.00 GiB on gpu:1, 12.00 GiB are free there. .* or a mesh of more devices"):
        check_memory({silent: GIB, full: 13 * GIB})
    with pytest.raises(MemoryNeedError, match=r"needs 2.00 GiB of host memory, 1.00 GiB are free"):
        check_memory({full: GIB}, staging_bytes=2 * GIB)


def write_group(folder, **files: str):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_the_limits_of_version_2_groups_and_their_parents_count_without_the_page_cache(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("0::/box/job\n")
    write_group(root / "box", memory__max="5000\n", memory__current="4000\n", memory__stat="anon 1000\ninactive_file 2000\nactive_file 500\n")
    write_group(root / "box" / "job", memory__max="max\n", memory__current="4000\n", memory__stat="anon 1000\n")
    assert cgroup_free_bytes(root, membership) == [5000 - (4000 - 2500)]


def test_the_limit_of_a_version_1_container_is_found_at_the_root_of_its_mount(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/\n")
    files = {"memory__usage_in_bytes": "4000", "memory__stat": "inactive_file 1\ntotal_inactive_file 100\ntotal_active_file 900\n"}
    write_group(root / "memory", memory__limit_in_bytes="4500", **files)
    assert cgroup_free_bytes(root, membership) == [1500]
    write_group(root / "memory", memory__limit_in_bytes="9223372036854771712", **files)
    assert cgroup_free_bytes(root, membership) == []


def test_a_system_without_groups_has_no_such_limit(tmp_path):
    assert cgroup_free_bytes(tmp_path / "cgroup", tmp_path / "membership") == []


def test_this_machine_has_some_memory_free():
    assert 0 < host_free_bytes() < 2**50


def test_the_demo_fits_this_machine():
    config = fit_to_mesh(open_checkpoint("demo").config, make_mesh({"tp": 4}), TENSOR)
    needed, largest = needed_bytes(config, dtype=np.float32, cache_bytes_per_device=2**20)
    check_memory(needed, staging_bytes=largest)
