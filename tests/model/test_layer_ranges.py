"""Layers run in ranges, as stages of a pipeline and early exit have them, are one run over all of them."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.page_table import PageTable
from tests.engine.conftest import CONFIG, make_packed_llm
from tests.support.tiny_models import MODELS
from tpllm.model.config import ALL_LAYERS
from tpllm.model.decoder import embed, finish, forward, run_layers, unembed
from tpllm.model.kv_cache import KVCache, init_cache

BY_NAME = {model.name: model for model in MODELS}
NAMES = ("qwen2-linear", "gemma2-layer-types", "gpt-oss-default", "starcoder2-default")
TOKENS, POSITIONS = np.arange(1, 25)[None] % 50, np.arange(24)[None].astype(np.int32)
TABLES = {ALL_LAYERS: PageTable(np.array([[2, 0]], np.int32))}


def model_of(name):
    return BY_NAME[name].on_mesh(1)


def bytes_of(array) -> bytes:
    return np.asarray(array).tobytes()


def whole(params, config):
    run = jax.jit(functools.partial(forward, config=config, tables=TABLES, output="hidden"))
    return run(params, TOKENS, POSITIONS, init_cache(config, 3, 16))


def as_stages(params, config, cut):
    """Each stage has the layers, the configuration and the cache of its own."""
    stream, layers = embed(params, TOKENS, config), []
    for first, last in ((0, cut), (cut, config.num_layers)):
        own = config.slice(first, last)
        run = jax.jit(functools.partial(run_layers, config=own, tables=TABLES))
        stream, cache = run(params.replace(layers=params.layers[first:last]), stream, POSITIONS, init_cache(own, 3, 16))
        layers += [cache.layer(index) for index in range(own.num_layers)]
    return finish(params, stream, config), KVCache.of_layers(layers)


@pytest.mark.parametrize("name", NAMES)
def test_ranges_in_one_program_give_the_bits_of_all_layers_at_once(name):
    params, config = model_of(name)

    def in_ranges(params, tokens, positions, cache):
        stream = embed(params, tokens, config)
        for first, last in ((0, 1), (1, None)):
            stream, cache = run_layers(params, stream, positions, cache, config, first=first, last=last, tables=TABLES)
        return finish(params, stream, config), cache

    def at_once(params, tokens, positions, cache):
        return forward(params, tokens, positions, cache, config, tables=TABLES, output="hidden")
    found, expected = (jax.jit(run)(params, TOKENS, POSITIONS, init_cache(config, 3, 16)) for run in (in_ranges, at_once))
    assert list(map(bytes_of, jax.tree.leaves(found))) == list(map(bytes_of, jax.tree.leaves(expected)))
    assert config.num_layers >= 2


@pytest.mark.parametrize("name", NAMES)
def test_stages_with_parts_of_model_and_cache_are_the_whole_model(name):
    params, config = model_of(name)
    for found, expected in zip(jax.tree.leaves(as_stages(params, config, 1)), jax.tree.leaves(whole(params, config)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.std(expected))  # programs of their own: XLA fuses otherwise


def test_stages_of_packed_weights_give_the_bits_of_the_whole_model(native_library):
    llm = make_packed_llm(config=CONFIG, dtype="bfloat16")
    found, expected = as_stages(llm.params, llm.config, 1), whole(llm.params, llm.config)
    assert list(map(bytes_of, jax.tree.leaves(found))) == list(map(bytes_of, jax.tree.leaves(expected)))


def test_a_slice_keeps_what_each_of_its_layers_is():
    _, config = model_of("gemma2-layer-types")
    last = config.slice(config.num_layers - 1, config.num_layers)
    assert (last.num_layers, last.layer_windows, last.layer_ropes) == (1, config.layer_windows[-1:], config.layer_ropes[-1:])
    assert last.sparse_layers == config.sparse_layers[-1:]
    assert config.slice(0, config.num_layers) == config


def test_an_early_exit_is_the_model_of_its_first_layers_alone():
    params, config = model_of("qwen2-linear")
    stream, _ = run_layers(params, embed(params, TOKENS, config), POSITIONS, None, config, last=1)
    early = unembed(params, finish(params, stream, config), config)
    alone, _ = forward(params.replace(layers=params.layers[:1]), TOKENS, POSITIONS, None, config.slice(0, 1))
    assert np.asarray(early).tobytes() == np.asarray(alone).tobytes()
    assert jnp.abs(early - forward(params, TOKENS, POSITIONS, None, config)[0])[..., :50].max() > 1e-3
