"""The decoder: chunks against whole prompts, rows that do not see each other, gradients."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.page_table import PageTable, one_page_a_row
from sharding_rules import DATA_TENSOR, ONE_DEVICE, ShardingError, make_mesh
from tests.support.tiny_models import MODELS, cached_greedy, place, step
from tpllm.families.registry import find_family
from tpllm.model import decoder
from tpllm.model.decoder import forward, unembed
from tpllm.model.kv_cache import cache_bytes_per_device, init_cache
from tpllm.model.params import DecoderParams, named_leaves
from tpllm.model.partition import fit_to_mesh

BY_NAME = {model.name: model for model in MODELS}
WINDOWED = BY_NAME["qwen2-linear"]  # a window in its upper layer, an odd vocabulary, biases


@functools.cache
def on_mesh(tp):
    return WINDOWED.on_mesh(tp)


@functools.partial(jax.jit, static_argnames=("config", "output"))
def uncached(params, tokens_BT, positions_BT, config, output="logits"):
    return forward(params, tokens_BT, positions_BT, None, config, output=output)[0]


@pytest.mark.parametrize("name", [WINDOWED.name, "gemma2-layer-types", "gemma3-linear", "smollm3-windows", "olmo2-kv-heads", "phi3-partial"])
def test_a_prompt_in_padded_chunks_gives_the_logits_of_the_whole_prompt(name):
    params, config = BY_NAME[name].on_mesh(1)
    prompt = BY_NAME[name].prompt()
    whole = np.asarray(uncached(params, np.array([prompt]), np.arange(len(prompt))[None], config))[0, :, :config.vocab_size]
    for chunk in (1, 16):
        chunked, _ = cached_greedy(params, config, prompt, num_steps=0, prefill_chunk=chunk)
        assert np.abs(chunked - whole).max() <= 1e-5 * whole.std()


def test_hidden_states_unembedded_are_the_logits_and_padding_of_the_vocabulary_is_never_sampled():
    params, config = on_mesh(4)
    assert (config.vocab_size, config.padded_vocab_size) == (203, 204)
    tokens, positions = np.array([WINDOWED.prompt()[:16]]), np.arange(16)[None]
    logits = np.asarray(uncached(params, tokens, positions, config))
    hidden = uncached(params, tokens, positions, config, output="hidden")
    assert (logits == np.asarray(jax.jit(unembed, static_argnums=2)(params, hidden, config))).all()
    assert logits.dtype == np.float32
    assert (logits[..., 203:] == -np.inf).all()
    assert np.isfinite(logits[..., :203]).all()


def decode_in_slot(tp, slot, *, others, junk):
    """Logits of four decode steps of one row after its prompt, as bytes; the other slots hold ``others`` tokens, or idle at -1."""
    params, config = on_mesh(tp)
    cache = jax.tree.map(lambda leaf: jax.device_put(np.full(leaf.shape, junk, np.float32), leaf.sharding), init_cache(config, 4, 160))
    chunk, prompt, rng, out = 16, WINDOWED.prompt()[:16], np.random.default_rng(0), []
    _, cache = step(params, np.array([prompt]), np.arange(chunk)[None], cache, config, table=one_page_a_row(4, np.array([slot], np.int32)))
    for position in range(chunk, chunk + 4):
        tokens = rng.integers(0, 203, (4, 1)) if others >= 0 else np.zeros((4, 1), np.int64)
        positions = np.full((4, 1), others + position - chunk if others >= 0 else -1)
        tokens[slot], positions[slot] = position, position
        logits, cache = step(params, tokens.astype(np.int32), positions.astype(np.int32), cache, config)
        out.append(np.asarray(logits)[slot].tobytes())
    return b"".join(out)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_row_is_bit_equal_alone_and_beside_others_and_in_every_slot(tp):
    alone = decode_in_slot(tp, 0, others=-1, junk=0.0)
    assert decode_in_slot(tp, 0, others=3, junk=7.0) == alone
    assert decode_in_slot(tp, 2, others=150, junk=-3.0) == alone  # the others are in the second block of the cache
    assert decode_in_slot(tp, 3, others=-1, junk=np.nan) == alone


def test_a_forward_writes_to_its_rows_of_the_cache_only():
    params, config = on_mesh(1)
    cache = jax.tree.map(lambda leaf: leaf + 7.0, init_cache(config, 4, 160))
    _, cache = step(params, np.array([WINDOWED.prompt()[:16]]), np.arange(16)[None], cache, config, table=one_page_a_row(4, np.array([2], np.int32)))
    for leaf in jax.tree.leaves(cache):
        is_new = (np.asarray(leaf) != 7.0).any(axis=(1, 3))
        assert is_new[2, :16].all()
        assert is_new.sum() == 16


def paged_logits(tp, pages_RL, page_size):
    """Logits of row 1's prompt in two ragged chunks beside tokens of row 0, then of one decode step of both; the pool begins as NaN."""
    params, config = on_mesh(tp)
    pool = init_cache(config, 40, page_size)
    cache = jax.tree.map(lambda leaf: jax.device_put(np.full(leaf.shape, np.nan, np.float32), leaf.sharding), pool)
    prompt, out, table = np.array(WINDOWED.prompt()[:40], np.int32), [], PageTable(np.array(pages_RL, np.int32))
    for first in (0, 20):
        positions = np.concatenate([np.arange(first, first + 20), np.arange(first // 5, first // 5 + 4), [-1]])[None].astype(np.int32)
        rows = np.array([[1] * 20 + [0] * 4 + [0]], np.int32)
        logits, cache = step(params, np.where(positions < 0, 0, prompt[positions]), positions, cache, config, table=table.replace(rows=rows))
        out.append(np.asarray(logits)[0, :24])
    logits, cache = step(params, prompt[:2, None], np.array([[8], [40]], np.int32), cache, config, table=table)
    return np.concatenate([*out, np.asarray(logits)[:, 0]])[:, :config.vocab_size]


@pytest.mark.parametrize("tp", [1, 2])
def test_pages_in_any_order_give_the_bits_of_pages_in_line_and_the_logits_without_a_cache(tp):
    inline = paged_logits(tp, [[0, 1, 2], [3, 4, 5]], 16)
    assert paged_logits(tp, [[31, -1, -1], [7, 39, 2]], 16).tobytes() == inline.tobytes()
    params, config = on_mesh(tp)
    prompt = WINDOWED.prompt()[:40]
    whole = np.asarray(uncached(params, np.array([prompt]), np.arange(40)[None], config))[0, :, :config.vocab_size]
    for size, pages in ((16, None), (48, [[2], [1]])):
        logits = inline if pages is None else paged_logits(tp, pages, size)
        wanted = np.concatenate([whole[:20], whole[:4], whole[20:40], whole[4:8]])
        assert np.abs(logits[:48] - wanted).max() <= 1e-5 * whole.std()


def test_a_cache_lies_on_its_mesh_by_rows_and_kv_heads_and_says_its_bytes():
    config = fit_to_mesh(WINDOWED.config, make_mesh({"dp": 2, "tp": 2}), DATA_TENSOR)
    cache = init_cache(config, 4, 32, jnp.bfloat16)
    assert (cache.num_pages, cache.page_size) == (4, 32)
    leaves = jax.tree.leaves(cache)
    assert {leaf.sharding.shard_shape(leaf.shape) for leaf in leaves} == {(2, config.stored_kv_heads // 2, 32, 8)}
    on_one_device = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device.id == 0)
    assert cache_bytes_per_device(config, 4, 32, jnp.bfloat16) == on_one_device
    with pytest.raises(ShardingError, match=r"kv_cache: dim 0 .* is 3"):
        init_cache(config, 3, 32)


@pytest.mark.parametrize("name", [WINDOWED.name, "olmo2-kv-heads", "starcoder2-default"])  # means over all heads; LayerNorm
def test_a_data_and_tensor_mesh_gives_each_row_the_logits_of_one_device(name):
    model = BY_NAME[name]
    config = fit_to_mesh(model.config, make_mesh({"dp": 2, "tp": 2}), DATA_TENSOR)
    params = place(model.weights(), config, find_family(model.hf))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 16)).astype(np.int32)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (4, 16))
    logits, _ = step(params, tokens, positions, init_cache(config, 4, 32), config)
    single_params, single = model.on_mesh(1)
    expected = np.asarray(uncached(single_params, tokens, positions, single))
    assert np.abs(np.asarray(logits)[..., :config.vocab_size] - expected).max() <= 1e-5 * expected.std()


def test_gradients_of_the_training_path_are_those_of_finite_differences():
    params, config = on_mesh(1)
    config = dataclasses.replace(config, activation="silu")  # ReLU has kinks that differences step over
    tokens = np.random.default_rng(0).integers(0, 203, (2, 12)).astype(np.int32)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))

    @jax.jit
    def loss(params):
        logits, _ = forward(params, tokens, positions, None, config)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1).mean()

    gradients = jax.jit(jax.grad(loss))(params)
    leaves, treedef = jax.tree.flatten(params)
    for index, (name, gradient) in enumerate(named_leaves(gradients)):
        gradient = np.asarray(gradient)
        assert np.isfinite(gradient).all(), name
        slope = float(np.sqrt((gradient.astype(np.float64)**2).sum()))
        direction, size = gradient / max(slope, 1e-12), 3e-3
        ahead, behind = (float(loss(jax.tree.unflatten(treedef, [*leaves[:index], leaves[index] + sign * size * direction, *leaves[index + 1:]])))
                         for sign in (1, -1))
        assert (ahead - behind) / (2 * size) == pytest.approx(slope, rel=1e-2, abs=1e-3), name


def test_padding_changes_nothing_in_the_training_path():
    params, config = on_mesh(1)
    tokens, positions = np.array([WINDOWED.prompt()[:16]]), np.arange(16)[None]
    padded = np.where(positions < 10, positions, -1)
    whole, part = (np.asarray(uncached(params, tokens, p, config)) for p in (positions, padded))
    assert np.abs(whole[:, :10] - part[:, :10]).max() <= 1e-5 * whole.std()
    assert np.isfinite(part).all()
    assert dataclasses.replace(config, partition=ONE_DEVICE) == WINDOWED.config


def test_a_multiplier_of_embeddings_is_rounded_to_the_dtype_they_have():
    model = BY_NAME["gemma-default"]  # the root of 40: 6.3246, and in bfloat16 6.3125
    table = jnp.asarray(model.weights()["model.embed_tokens.weight"], jnp.bfloat16)
    params = DecoderParams(embed=table, layers=(), final_norm=jnp.zeros(40, jnp.bfloat16))
    x_1TD = decoder.embed(params, np.array([[3, 5]]), model.config).x
    assert (np.asarray(x_1TD[0]) == np.asarray((table[np.array([3, 5])].astype(jnp.float32) * 6.3125).astype(jnp.bfloat16))).all()
