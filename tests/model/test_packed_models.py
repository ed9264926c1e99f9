"""Tiny models from folders, packed for the native kernels: what ``transformers`` answered, and the same bits whatever shares the batch."""
import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from sharding_rules import TENSOR, make_mesh
from tests.model.test_golden import NAMES, load
from tests.support.checkpoint_files import write_folder
from tests.support.tiny_models import ARCHITECTURES, NUM_STEPS, cached_greedy, step
from tpllm import LLM, SamplingParams
from tpllm.checkpoint.folder import open_checkpoint
from tpllm.checkpoint.load import load_params
from tpllm.model.kv_cache import init_cache
from tpllm.model.partition import fit_to_mesh
from tpllm.weights.native import NativeWeight
from tpllm.weights.storage import NATIVE, Storage

pytestmark = pytest.mark.usefixtures("native_library")
OWN_FEATURES = [name for name in NAMES if name.split("-")[0] not in ARCHITECTURES]


@functools.cache
def packed(name, tp, folder, dtype="float32"):
    """A golden model, written as a checkpoint and loaded packed."""
    model = load(name)[1]
    if not folder.exists():
        write_folder(folder, dict(model.hf), model.weights())
    checkpoint = open_checkpoint(folder)
    config = fit_to_mesh(checkpoint.config, make_mesh({"tp": tp}), TENSOR)
    params = load_params(checkpoint, config, dtype=dtype, storage=Storage(np.dtype(dtype), device=NATIVE))
    assert isinstance(params.layers[0].attn.q, NativeWeight)
    return params, config


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("tp", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OWN_FEATURES)
def test_a_packed_model_gives_the_logits_and_tokens_of_transformers(name, tp, folders):
    golden, model = load(name)
    params, config = packed(name, tp, folders / name)
    logits, tokens = cached_greedy(params, config, model.prompt(), num_steps=NUM_STEPS, prefill_chunk=16, decode_width=16)
    error = np.abs(logits[golden["positions"]] - golden["logits"]).max() / golden["logits"].std()
    assert error <= (1e-4 if tp == 1 else 3e-4)
    assert tokens == golden["tokens"].tolist()


@pytest.mark.parametrize(("dtype", "tp"), [("float32", 1), ("bfloat16", 2)])
@pytest.mark.parametrize("name", OWN_FEATURES)
def test_a_row_has_the_same_bits_at_any_number_of_rows(name, dtype, tp, folders):
    params, config = packed(name, tp, folders / name, dtype)
    rng, num_tokens = np.random.default_rng(0), 5
    tokens = rng.integers(0, config.vocab_size, (13, num_tokens)).astype(np.int32)
    positions = np.broadcast_to(np.arange(num_tokens, dtype=np.int32), tokens.shape)

    def logits(num_rows):
        cache = init_cache(config, num_rows, 32, jnp.dtype(dtype))
        return np.asarray(step(params, tokens[:num_rows], positions[:num_rows], cache, config)[0])
    assert logits(1).tobytes() == logits(13)[:1].tobytes()  # more than a kernel computes straight from codes; its own tests have those between


@pytest.mark.parametrize("name", ["gemma2-default", "gemma3-linear", "phi3-short-prompt-grows-past-context", "qwen2moe-default", "gpt-oss-yarn"])
def test_the_engine_gives_the_same_tokens_in_a_batch_of_rows_of_other_lengths(name, folders):
    golden, _ = load(name)
    params, config = packed(name, 2, folders / name)
    others = [{"prompt_token_ids": (golden["prompt"][::-1].tolist() * 2)[:length]} for length in (3, 40, 17)]
    greedy = SamplingParams(temperature=0, max_tokens=NUM_STEPS, ignore_eos=True)
    config = dataclasses.replace(config, max_position=128)  # the prompts of most golden files go beyond the context of their config.json
    with LLM.from_params(config, params, max_num_seqs=4, prefill_chunk_size=16) as llm:
        prompt = {"prompt_token_ids": golden["prompt"].tolist()}
        for prompts in ([prompt], [others[0], prompt, *others[1:]]):
            tokens = llm.generate(prompts, greedy)[prompts.index(prompt)].outputs[0].token_ids
            assert tokens == golden["tokens"].tolist()
