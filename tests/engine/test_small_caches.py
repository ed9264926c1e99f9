"""Keys and values of 8 bits: close to those of 32, the same whatever shares the batch, a quarter of the memory."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_append import quantize_entries
from tests.engine.test_invariance import PARAMS, PROMPTS, exact
from tpllm import LLM, SamplingParams, forward, init_cache
from tpllm.loading import load_model
from tpllm.model.kv_cache import cache_bytes_per_device

from tests.engine.conftest import make_llm  # isort: skip

CLOSE = {"float16": 1e-3, "int8": 0.02, "fp8": 0.1}
TEXT = "def add(first, second):\n    \"\"\"The sum.\"\"\"\n    return first + second\n\n\nclass Point:\n    def __init__(self, x, y):\n"


@functools.cache
def prompt_logprobs(path, kv_cache_dtype, mesh="tp=1"):
    """Of a prompt of several chunks, which read what is in the cache; the fixture's path is only here to tell results apart."""
    llm = LLM("demo", mesh=mesh, dtype="float32", kv_cache_dtype=kv_cache_dtype, max_model_len=128, max_num_seqs=2, prefill_chunk_size=16)
    [output] = llm.generate([TEXT], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    tokens = output.prompt_token_ids
    return np.array([entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)])


@pytest.mark.parametrize("kind", CLOSE)
def test_log_probabilities_are_close_to_those_of_a_float32_cache(path, kind):
    expected, found = (prompt_logprobs(path, dtype) for dtype in ("float32", kind))
    assert 0 < np.abs(found - expected).mean() < CLOSE[kind]


def test_so_they_are_on_a_mesh(path):
    found, cut = (prompt_logprobs(path, "int8", mesh) for mesh in ("tp=1", "tp=2"))
    np.testing.assert_allclose(cut, found, atol=CLOSE["int8"])


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rows_are_bit_identical_alone_and_in_a_batch(kind):
    llm = make_llm({"tp": 2}, kv_cache_dtype=kind)
    together = exact(llm.generate(PROMPTS, PARAMS))
    assert [exact(llm.generate(prompt, params))[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)] == together


@pytest.mark.parametrize("kind", [jnp.int8, jnp.float8_e4m3fn])
def test_a_chunked_prefill_writes_the_cache_of_one_call(path, kind):
    llm = make_llm()
    config = llm.config
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 24), np.int32)
    positions = np.arange(24, dtype=np.int32)[None]
    run = functools.partial(jax.jit(lambda params, *args: forward(params, *args, config)), llm.params)
    whole, cache = run(tokens, positions, init_cache(config, 1, 64, kind))
    again = init_cache(config, 1, 64, kind)
    parts = []
    for first in range(0, 24, 8):
        part, again = run(tokens[:, first:first + 8], positions[:, first:first + 8], again)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-2)
    assert again.key_scales[0].shape == (1, config.stored_kv_heads, 64)
    codes = [np.asarray(arrays[0]).view(np.int8)[:, :, :24] for arrays in (cache.keys, again.keys)]
    assert (codes[0] == codes[1]).mean() > 0.99


@pytest.mark.parametrize(("kind", "largest"), [(jnp.int8, 127), (jnp.float8_e4m3fn, 448)])
def test_entries_are_off_by_a_step_of_their_own_largest(kind, largest):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 64), np.float32)) * jnp.array([1e-6, 1.0, 1e6, 0.0])[:, None]
    codes, scales = quantize_entries(x, kind)
    assert scales.shape == (2, 3, 4)
    assert not np.asarray(codes[:, :, 3]).astype(np.float32).any()
    np.testing.assert_allclose(scales, np.abs(x).max(-1) / largest, rtol=1e-6)
    off = np.abs(codes.astype(jnp.float32) * scales[..., None] - x)
    assert (off <= np.abs(x).max(-1, keepdims=True) * (0.51 / 127 if kind == jnp.int8 else 1 / 16)).all()


def test_a_cache_of_8_bits_takes_a_quarter_and_its_scales():
    config = load_model("demo", "tp=1")[0]
    full = cache_bytes_per_device(config, 2, 128, jnp.float32)
    assert cache_bytes_per_device(config, 2, 128, jnp.int8) == full // 4 + full // config.head_dim
    cache = init_cache(config, 2, 128, jnp.int8)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == cache_bytes_per_device(config, 2, 128, jnp.int8)
