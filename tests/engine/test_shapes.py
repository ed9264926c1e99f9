"""The sizes that are chosen before anything is loaded."""
import jax
import pytest

from sharding_rules import DATA_TENSOR, make_mesh, parse_mesh
from tests.support.tiny_models import config_json
from tpllm.engine.shapes import choose_shapes
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
