"""The engine on packed weights: rows do not depend on their batch at any number of rows, and quantized weights mean what XLA makes of them."""
import functools

import jax
import numpy as np
import pytest

from tests.engine.conftest import make_packed_llm, random_prompts
from tpllm import LLM, SamplingParams, load_model, native
from tpllm.checkpoint import memory
from tpllm.errors import ConfigError, MemoryNeedError
from tpllm.weights.linear import lookup
from tpllm.weights.native import NativeWeight
from tpllm.weights.xla import XlaWeight

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the native library is not built here")

PROMPTS = ["import os\n", "def main():", "for i in range(", "class A:\n    x = 1\n", "x",
           "# A comment of some length, to fill more than one chunk\n" * 3, "1 +"]
KINDS = {"float32": {"dtype": "float32"}, "bfloat16": {}, "float16": {"dtype": "float16"}, "int8": {"quantization": "int8"},
         "int4": {"quantization": "int4"}, "int8 in float32": {"quantization": "int8", "dtype": "float32"}}
SIZES = {"max_num_seqs": 4, "max_model_len": 256, "prefill_chunk_size": 16}
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


def results(llm, prompts, params):
    return [[(completion.token_ids, [top[token].logprob for token, top in zip(completion.token_ids, completion.logprobs, strict=True)])
             for completion in output.outputs] for output in llm.generate(prompts, params)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_gives_the_bits_it_gives_in_a_batch_of_seven_and_in_another_order(kind):
    llm, prompts = make_packed_llm(**{"dtype": "bfloat16", **KINDS[kind]}), random_prompts(3, 18, 40, 64, 90, 7, 33)
    assert llm.shapes.row_buckets == (1, 2, 4)
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, seed=3, max_tokens=12, logprobs=0)
        together = results(llm, prompts, params)
        assert results(llm, prompts[::-1], params) == together[::-1]
        assert [results(llm, [prompt], params)[0] for prompt in prompts] == together
        assert results(llm, prompts[:3], params) == together[:3]


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"dp": 2, "tp": 2}], ids=str)
def test_so_it_is_on_a_mesh(mesh):
    llm, prompts, params = make_packed_llm(mesh, dtype="bfloat16"), random_prompts(3, 18, 40), SamplingParams(temperature=0, max_tokens=8, logprobs=0)
    assert [results(llm, [prompt], params)[0] for prompt in prompts] == results(llm, prompts, params)


def test_the_chunks_of_a_prompt_do_not_change_a_bit():
    prompt, params = "def f(x):\n    return x\n" * 6, SamplingParams(temperature=0, max_tokens=8, logprobs=0)
    chunked = []
    for chunk in (16, 256):
        with LLM("demo", mesh="tp=1", **{**SIZES, "prefill_chunk_size": chunk}) as llm:
            chunked.append(results(llm, [prompt], params))
    assert chunked[0] == chunked[1]


@pytest.mark.parametrize(("quantization", "mesh"), [("int8", "tp=1"), SLOW("int8", "tp=2"), SLOW("int4", "tp=1"), ("int4", "tp=4"), (None, "tp=4")])
def test_in_float32_packed_weights_give_the_greedy_tokens_of_what_xla_computes_with_them(quantization, mesh):
    config, params, tokenizer = load_model("demo", mesh, dtype="float32", quantization=quantization)
    assert isinstance(params.layers[0].attn.q, XlaWeight if quantization else jax.Array)
    greedy = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    with LLM("demo", mesh=mesh, dtype="float32", quantization=quantization, **SIZES) as packed:
        assert isinstance(packed.params.layers[0].attn.q, NativeWeight)
        tokens = [output.outputs[0].token_ids for output in packed.generate(PROMPTS[:3], greedy)]
    with LLM.from_params(config, params, tokenizer, **SIZES) as plain:
        assert [output.outputs[0].token_ids for output in plain.generate(PROMPTS[:3], greedy)] == tokens


def test_quantized_weights_take_their_bytes_and_the_kernels_are_named():
    held = {}
    for kind in ("bfloat16", "int8", "int4"):
        with LLM("demo", mesh="tp=1", **SIZES, **KINDS[kind]) as llm:
            held[kind] = sum(leaf.nbytes for leaf in jax.tree.leaves(llm.params))
            assert llm.fingerprint()["kernels"] == f"native {native.instruction_set()}"
            assert llm.fingerprint()["quantization"] == KINDS[kind].get("quantization")
    assert held["int8"] < 0.52 * held["bfloat16"]
    table = 2 * 4096 * 256
    rest = held["bfloat16"] - table
    assert 0.5 * table + 0.25 * rest < held["int4"] < 0.52 * table + 0.29 * rest  # 8 bits for the table; 4 and 16 for a scale of 32


def test_an_unknown_quantization_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"quantization is 'int3'; did you mean 'int8'\? it must be one of int8, w8a8"):
        LLM("demo", quantization="int3")


def test_the_memory_check_counts_quantized_weights_as_they_are_kept(monkeypatch):
    config, params, _ = load_model("demo", "tp=1", quantization="int4", packed=True)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    monkeypatch.setattr(memory, "host_free_bytes", lambda: weights // 2)
    with pytest.raises(MemoryNeedError, match=r"needs \d+\.\d+ GiB of host memory, \d+\.\d+ GiB are free"):
        load_model("demo", "tp=1", quantization="int4", packed=True)
    monkeypatch.setattr(memory, "host_free_bytes", lambda: 2 * weights)  # dense ones are more than three times as large
    assert config == load_model("demo", "tp=1", quantization="int4", packed=True)[0]


@pytest.mark.parametrize("mesh", ["tp=1", "tp=8"])
def test_rows_of_a_packed_embedding_are_those_of_the_plain_one(mesh):
    (config, packed, _), (_, plain, _) = (load_model("demo", mesh, dtype="float32", packed=is_packed) for is_packed in (True, False))
    assert packed.embed.shape[0] == config.padded_vocab_size
    assert packed.dtype == np.float32
    tokens = np.array([[0, 5, 511, 512, 4095]], np.int32)
    assert np.array_equal(lookup(tokens, packed.embed, packed.dtype), np.asarray(plain.embed)[tokens])
