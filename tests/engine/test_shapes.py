"""The sizes that are chosen before anything is loaded."""
import types

import jax
import pytest

from sharding_rules import DATA_TENSOR, make_mesh, parse_mesh
from tests.support.tiny_models import config_json
from tpllm.engine import shapes
from tpllm.engine.shapes import choose_num_pages, choose_shapes
from tpllm.environment import memory
from tpllm.errors import ConfigError
from tpllm.families.llama import FAMILY
from tpllm.model.partition import fit_to_mesh

CONFIG = FAMILY.config_from_hf(config_json("llama"))


def shapes_on(mesh: str, **sizes):
    config = fit_to_mesh(CONFIG, make_mesh(parse_mesh(mesh), jax.devices()), DATA_TENSOR)
    return choose_shapes(config, **{"max_model_len": None, "max_num_seqs": None, "prefill_chunk_size": None, "batch_invariant": True, **sizes})


def test_the_default_number_of_rows_is_one_that_the_data_axis_divides():
    assert shapes_on("dp=2").max_num_seqs == 8
    assert shapes_on("dp=3").max_num_seqs == 9


def test_a_number_of_rows_that_the_data_axis_does_not_divide_is_refused_with_the_next_one():
    with pytest.raises(ConfigError, match="max_num_seqs 3 is no multiple of the mesh's dp size 2; use 4"):
        shapes_on("dp=2", max_num_seqs=3)


def test_a_context_beyond_the_models_is_refused():
    context = CONFIG.max_position
    assert shapes_on("tp=1").max_model_len == context
    with pytest.raises(ConfigError, match=f"max_model_len is {context + 1}; the model's context is {context}"):
        shapes_on("tp=1", max_model_len=context + 1)


def test_a_share_of_a_devices_memory_counts_what_this_process_has_taken(monkeypatch):
    config = fit_to_mesh(CONFIG, make_mesh({"tp": 2}), DATA_TENSOR)
    sizes = choose_shapes(config, max_model_len=None, max_num_seqs=1024, prefill_chunk_size=None, batch_invariant=True)
    one = shapes.page_bytes(config, sizes, "float32")
    monkeypatch.setattr(shapes, "host_unused_bytes", lambda share: int(share * 200 * one) - 40 * one)  # of 200 pages 40 are taken
    monkeypatch.setattr(shapes, "host_free_bytes", lambda: 150 * one)
    found = [choose_num_pages(config, sizes, "float32", gpu_memory_utilization=share) for share in (0.5, 0.9)]
    assert found == [(100 - 40) // 2, (180 - 40) // 2]  # two devices share it
    monkeypatch.setattr(shapes, "host_free_bytes", lambda: 20 * one)
    assert choose_num_pages(config, sizes, "float32", gpu_memory_utilization=0.9) == 10
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization allows 0 bytes.*raise gpu_memory_utilization"):
        choose_num_pages(config, sizes, "float32", gpu_memory_utilization=0.1)


def test_what_is_not_used_of_memory_is_less_than_all():
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1000, "bytes_in_use": 300})
    assert memory.device_unused_bytes(device, 0.5) == 200
    assert 0 < memory.host_unused_bytes(1.0) < memory.host_unused_bytes(2.0)
