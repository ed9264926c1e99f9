"""Fitting a model to a mesh, and the parameters that follow."""
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding_rules import REPLICATED, TENSOR, ShardingError, make_mesh
from tpllm.model.config import ModelConfig
from tpllm.model.params import abstract_params, init_params, named_leaves, param_shardings
from tpllm.model.partition import fit_to_mesh, kv_repeat, largest_tensor_axis


def config(**fields):
    sizes = {"vocab_size": 101, "hidden_size": 20, "num_layers": 1, "num_heads": 8, "num_kv_heads": 2, "head_dim": 4,
             "intermediate_size": 48, "max_position": 64}
    return ModelConfig(**{**sizes, **fields})


@pytest.mark.parametrize(("heads", "kv_heads", "shards", "repeat"), [
    (8, 8, 8, 1), (8, 2, 2, 1), (8, 2, 4, 2), (8, 1, 8, 8), (6, 3, 2, 2), (12, 3, 4, 4), (24, 3, 8, 8), (32, 8, 16, 2), (12, 4, 6, 3)])
def test_each_shard_owns_the_kv_heads_that_its_queries_read(heads, kv_heads, shards, repeat):
    assert kv_repeat(heads, kv_heads, shards) == repeat
    stored = np.repeat(np.arange(kv_heads), repeat)
    for shard in range(shards):
        queries = np.arange(heads).reshape(shards, -1)[shard]
        owned = stored.reshape(shards, -1)[shard]
        local_group = len(queries) // len(owned)
        assert [owned[i // local_group] for i in range(len(queries))] == [query // (heads // kv_heads) for query in queries]


def test_a_vocabulary_is_padded_to_the_mesh_and_the_padding_is_stored():
    fitted = fit_to_mesh(config(), make_mesh({"tp": 8}), TENSOR)
    assert (fitted.vocab_size, fitted.padded_vocab_size) == (101, 104)
    assert abstract_params(fitted, jnp.float32).embed.shape == (104, 20)
    assert fit_to_mesh(config(), make_mesh({"tp": 8}), REPLICATED).padded_vocab_size == 101


def test_heads_that_tp_does_not_divide_leave_attention_replicated_and_the_log_says_so_once(caplog):
    with caplog.at_level(logging.WARNING, logger="tpllm"):
        fitted = fit_to_mesh(config(num_heads=6, num_kv_heads=3), make_mesh({"tp": 4}), TENSOR)
    assert [record.getMessage() for record in caplog.records] == [
        "attention is replicated: its 6 heads cannot be cut into 4 equal shards; a mesh whose tp divides 6 shards it"]
    assert fitted.kv_repeat == 1
    specs = dict(named_leaves(param_shardings(fitted)))
    assert specs["layers.0.attn.q"].is_fully_replicated
    assert not specs["layers.0.mlp.gate"].is_fully_replicated


def test_a_model_that_fits_says_nothing(caplog):
    with caplog.at_level(logging.INFO, logger="tpllm"):
        fit_to_mesh(config(), make_mesh({"tp": 4}), TENSOR)
    assert caplog.records == []


def test_an_inner_size_that_tp_does_not_divide_is_refused_with_the_parameter_named():
    with pytest.raises(ShardingError, match=r"layers\.0\.mlp\.gate: dim 0 \('mlp'\) of shape \(50, 20\) is 50, .* of size 4"):
        fit_to_mesh(config(intermediate_size=50), make_mesh({"tp": 4}), TENSOR)


@pytest.mark.parametrize(("fields", "devices", "tp"), [({}, 8, 8), ({}, 6, 4), ({"num_heads": 6, "num_kv_heads": 3}, 8, 6),
                                                      ({"intermediate_size": 7}, 8, 1), ({"num_heads": 5, "num_kv_heads": 1}, 4, 1)])
def test_the_largest_tensor_axis_divides_heads_and_inner_size(fields, devices, tp):
    assert largest_tensor_axis(config(**fields), devices) == tp


def test_random_parameters_have_the_declared_shapes_and_shardings_and_repeat_with_their_seed():
    fitted = fit_to_mesh(config(has_qkv_bias=True, has_qk_norm=True), make_mesh({"tp": 4}), TENSOR)
    params = init_params(fitted, 3)
    for (name, leaf), (_, declared) in zip(named_leaves(params), named_leaves(abstract_params(fitted, jnp.float32)), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (declared.shape, declared.dtype, declared.sharding), name
    again = init_params(fitted, 3)
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True))
    assert (np.asarray(params.layers[0].attn_norm) == 1).all()
    assert not np.asarray(params.layers[0].attn.q_bias).any()
    assert np.asarray(params.layers[0].attn.q).std() == pytest.approx(20**-0.5, rel=0.1)
    assert (np.asarray(params.layers[0].attn.q) != np.asarray(init_params(fitted, 4).layers[0].attn.q)).any()
