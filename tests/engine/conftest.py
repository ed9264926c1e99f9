"""A tiny random model behind an engine, shared by the tests of this folder."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding_rules import DATA_TENSOR, ONE_DEVICE, make_mesh
from tests.tokenizer import tokenizer_folders
from tpllm import ops
from tpllm.bench.shapes import random_params
from tpllm.llm import LLM
from tpllm.model.config import ModelConfig
from tpllm.model.params import abstract_params, init_params
from tpllm.model.partition import fit_to_mesh
from tpllm.tokenizer import Tokenizer
from tpllm.weights.policy import parse_policy
from tpllm.weights.storage import NATIVE, Storage

CONFIG = ModelConfig(vocab_size=96, hidden_size=64, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=16, intermediate_size=128,
                     max_position=160, ties_embeddings=True)
SHAPES = {"max_num_seqs": 4, "prefill_chunk_size": 16, "max_model_len": 120, "page_size": 16}
"""Engines of the same options share their programs: a test that asks for others compiles its own."""


def make_llm(mesh: dict[str, int] | None = None, *, config: ModelConfig = CONFIG, **options) -> LLM:
    """An engine over random weights, the same on every mesh."""
    fitted = fit_to_mesh(config, make_mesh(mesh or {"tp": 1}), DATA_TENSOR)
    params = init_params(dataclasses.replace(fitted, partition=ONE_DEVICE), 0)
    params = jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim == 2 else leaf, params)  # logits that mean something
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(fitted, jnp.float32))
    return LLM.from_params(fitted, jax.device_put(params, shardings), **{**SHAPES, **options})


def make_packed_llm(mesh: dict[str, int] | None = None, *, config: ModelConfig = CONFIG, dtype: str = "float32", quantization: str | None = None,
                    **options) -> LLM:
    """The like with weights packed for the native kernels, so that rows do not depend on how many tokens are computed with theirs."""
    fitted = fit_to_mesh(config, make_mesh(mesh or {"tp": 1}), DATA_TENSOR)
    params = random_params(fitted, Storage(jnp.dtype(dtype), parse_policy(quantization), device=NATIVE))
    return LLM.from_params(fitted, params, **{**SHAPES, **options})


def random_prompts(*lengths: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Prompts of random token ids."""
    rng = np.random.default_rng(seed)
    return [{"prompt_token_ids": rng.integers(0, CONFIG.vocab_size, length).tolist()} for length in lengths]


@pytest.fixture(params=["native", "xla"])
def path(request, monkeypatch):
    """Native kernels, or what XLA makes of the references."""
    if request.param == "native" and not ops.uses_native(ONE_DEVICE):
        pytest.skip("the native library is not built here")
    if request.param == "xla":
        monkeypatch.setattr(ops, "uses_native", lambda _: False)
    return request.param


@pytest.fixture(scope="session")
def llm() -> LLM:
    """One engine on one device; every test leaves it idle."""
    return make_llm()


@pytest.fixture(scope="session")
def text_llm(tmp_path_factory) -> LLM:
    """The same with a small byte-level tokenizer of Llama 3's kind, so that outputs have text; every test leaves it idle."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    folder = tokenizer_folders.write_folder(tmp_path_factory.mktemp("tokenizer"), tokenizer_folders.llama3_like(), tokenizer_config=settings)
    tokenizer = Tokenizer.from_folder(folder)
    return make_llm(config=dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size), tokenizer=tokenizer)


def lowered_decode(llm: LLM) -> jax.stages.Lowered:
    """The decode program of an LLM, of all slots."""
    executor, num_slots = llm._engine.runner.executor, llm.shapes.max_num_seqs
    return executor.programs.decode.lower(executor.params, executor.cache, executor.state, np.ones(num_slots, np.int32), llm._engine.scheduler.tables,
                                          num_rows=num_slots)
