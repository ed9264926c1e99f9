"""What decoding reads, counted by hand."""
import dataclasses
import math

import jax.numpy as jnp
import pytest

from sharding_rules import DATA_TENSOR, make_mesh
from tpllm.bench.shapes import SHAPES, find_shape
from tpllm.bench.traffic import decode_traffic, valid_tokens
from tpllm.errors import ConfigError
from tpllm.model.params import init_params, named_leaves, param_specs
from tpllm.model.partition import fit_to_mesh

TINY = SHAPES["tiny"]  # hidden 128, 2 layers, 4 heads and 2 KV heads of 32, FFN 256, vocabulary 512
TABLE = 512 * 128
LAYER = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 256 + 2 * 128
LENGTHS = {"batch_size": 3, "prompt_len": 10, "output_len": 5}


def traffic_of(config=TINY, mesh=None, dtype=jnp.float32, kv_dtype=jnp.float32, **changes):
    fitted = fit_to_mesh(config, make_mesh(mesh or {"tp": 1}), DATA_TENSOR)
    return decode_traffic(fitted, init_params(fitted, 0, dtype), kv_dtype=kv_dtype, **{**LENGTHS, **changes})


def test_every_weight_is_read_but_an_embedding_table_that_is_not_the_head():
    traffic = traffic_of()
    assert traffic.weight_bytes == 4 * (2 * TABLE + 2 * LAYER + 128)
    assert traffic.weight_bytes_read == 4 * (TABLE + 2 * LAYER + 128)


def test_a_tied_table_is_read_as_the_head():
    traffic = traffic_of(dataclasses.replace(TINY, ties_embeddings=True))
    assert traffic.weight_bytes == traffic.weight_bytes_read == 4 * (TABLE + 2 * LAYER + 128)


def test_valid_tokens_are_those_each_step_sees():
    # The prefill gives token 1; the four steps after it see 11, 12, 13 and 14 cached tokens.
    assert valid_tokens(10, 5, None) == 12.5
    assert valid_tokens(10, 5, 12) == (11 + 12 + 12 + 12) / 4
    assert valid_tokens(1, 2, None) == 2


def test_keys_and_values_of_every_row_and_layer_are_read():
    token = 2 * 2 * 32  # a key and a value of two heads in one layer
    assert traffic_of().kv_bytes_valid == 3 * 2 * token * 12.5 * 4
    assert traffic_of(kv_dtype=jnp.bfloat16).kv_bytes_valid == 3 * 2 * token * 12.5 * 2
    windowed = dataclasses.replace(TINY, layer_windows=(None, 12))
    assert traffic_of(windowed).kv_bytes_valid == 3 * token * (12.5 + 11.75) * 4


def test_a_step_reads_weights_once_for_all_rows():
    one, three = traffic_of(batch_size=1), traffic_of()
    assert one.bytes_per_step == one.bytes_per_token == one.weight_bytes_read + one.kv_bytes_valid
    assert three.bytes_per_token * 3 == three.bytes_per_step == one.weight_bytes_read + 3 * one.kv_bytes_valid


def test_on_a_mesh_what_every_device_reads_is_counted():
    one, norms = traffic_of(), 4 * 5 * 128
    assert traffic_of(mesh={"tp": 2}).weight_bytes_read == one.weight_bytes_read + norms
    assert traffic_of(mesh={"tp": 2}).kv_bytes_valid == one.kv_bytes_valid
    repeated = traffic_of(mesh={"tp": 4})  # two KV heads on four devices: each is stored twice
    assert repeated.kv_bytes_valid == 2 * one.kv_bytes_valid
    replicas = traffic_of(mesh={"dp": 2}, batch_size=4)
    assert replicas.weight_bytes_read == 2 * one.weight_bytes_read
    assert replicas.kv_bytes_valid == traffic_of(batch_size=4).kv_bytes_valid


@pytest.mark.parametrize(("name", "billions"), [("llama-160m", 0.162), ("tinyllama-1.1b", 1.100), ("mistral-7b", 7.242),
                                                ("llama-3.1-8b", 8.030), ("llama-3.1-70b", 70.554)])
def test_known_shapes_have_the_published_number_of_parameters(name, billions):
    count = sum(math.prod(spec.shape) for _, spec in named_leaves(param_specs(find_shape(name))))
    assert round(count / 1e9, 3) == billions


def test_an_unknown_shape_is_refused_with_the_known_ones_named():
    with pytest.raises(ConfigError, match=r"unknown shape 'huge'; known: tiny, llama-160m, tinyllama-1\.1b, mistral-7b"):
        find_shape("huge")
