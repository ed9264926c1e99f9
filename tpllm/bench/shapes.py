"""Known model shapes, to measure on random weights: speed and memory depend on sizes, not on values."""
import concurrent.futures
import math
import os
import zlib
from typing import Any

import jax
import numpy as np

from sharding_rules import DATA_TENSOR
from tpllm.checkpoint.memory import check_memory, needed_bytes
from tpllm.checkpoint.placement import fill_by_rows, make_matrix, place
from tpllm.engine.options import EngineOptions
from tpllm.engine.shapes import least_cache_bytes
from tpllm.environment.compile_cache import enable_compile_cache
from tpllm.errors import ConfigError
from tpllm.llm import LLM
from tpllm.loading import choose_cache_dtype, choose_dtype, choose_mesh
from tpllm.model.config import ModelConfig, RopeConfig
from tpllm.model.params import DecoderParams, ParamSpec, init_params, map_specs, param_specs
from tpllm.model.partition import fit_to_mesh
from tpllm.weights.policy import Quantization, parse_policy
from tpllm.weights.storage import Storage

LLAMA31_ROPE = RopeConfig(kind="llama3", theta=500000.0, factor=8.0, original_max_position=8192)
SHAPES = {
    "tiny": ModelConfig(vocab_size=512, hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, intermediate_size=256,
                        max_position=512),
    "llama-160m": ModelConfig(vocab_size=32000, hidden_size=768, num_layers=12, num_heads=12, num_kv_heads=12, head_dim=64,
                              intermediate_size=3072, max_position=2048),
    "tinyllama-1.1b": ModelConfig(vocab_size=32000, hidden_size=2048, num_layers=22, num_heads=32, num_kv_heads=4, head_dim=64,
                                  intermediate_size=5632, max_position=2048),
    "mistral-7b": ModelConfig(vocab_size=32000, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
                              intermediate_size=14336, max_position=32768, layer_windows=(4096,) * 32),
    "llama-13b": ModelConfig(vocab_size=32000, hidden_size=5120, num_layers=40, num_heads=40, num_kv_heads=40, head_dim=128,
                             intermediate_size=13824, max_position=4096),
    "llama-3.1-8b": ModelConfig(vocab_size=128256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
                                intermediate_size=14336, max_position=131072, rope=LLAMA31_ROPE),
    "llama-3.1-70b": ModelConfig(vocab_size=128256, hidden_size=8192, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128,
                                 intermediate_size=28672, max_position=131072, rope=LLAMA31_ROPE),
    "llama-3.1-405b": ModelConfig(vocab_size=128256, hidden_size=16384, num_layers=126, num_heads=128, num_kv_heads=8, head_dim=128,
                                  intermediate_size=53248, max_position=131072, rope=LLAMA31_ROPE),
    "qwen3-32b": ModelConfig(vocab_size=151936, hidden_size=5120, num_layers=64, num_heads=64, num_kv_heads=8, head_dim=128,
                             intermediate_size=25600, max_position=40960, rope=RopeConfig(theta=1e6), has_qk_norm=True),
    "mixtral-8x7b": ModelConfig(vocab_size=32000, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
                                intermediate_size=14336, max_position=32768, rope=RopeConfig(theta=1e6), num_experts=8, num_experts_per_token=2,
                                expert_size=14336),
}


def find_shape(name: str) -> ModelConfig:
    """The configuration of a known shape.

    Raises:
        ConfigError: an unknown one; the known ones are named.
    """
    if name not in SHAPES:
        raise ConfigError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}; or measure a model of your own with --model")
    return SHAPES[name]


def llm_of_shape(name: str, *, mesh: str = "auto", dtype: str = "auto", quantization: Quantization = None,
                 kv_cache_dtype: str = "auto", **engine: Any) -> LLM:
    """An engine over random weights of a known shape; without a tokenizer.

    Args:
        name: a key of ``SHAPES``.
        mesh, dtype, quantization, kv_cache_dtype, engine: as for :class:`tpllm.llm.LLM`. ``dtype="auto"`` is bfloat16, and float32 on a CPU
            without native kernels.

    Raises:
        ConfigError: an unknown shape, or a context beyond its own.
        MemoryNeedError: weights and cache do not fit; nothing has been made then.
    """
    config, policy = find_shape(name), parse_policy(quantization)
    enable_compile_cache()
    fitted = fit_to_mesh(config, choose_mesh(mesh, config), DATA_TENSOR)
    weight_dtype = choose_dtype(dtype, {}, fitted.partition)
    storage = Storage.on(fitted.partition, weight_dtype, policy)
    options = EngineOptions(**engine)
    cache_dtype = choose_cache_dtype(kv_cache_dtype, weight_dtype)
    shapes = options.shapes(fitted, has_invariant_kernels=storage.is_native)
    cache_bytes = least_cache_bytes(fitted, shapes, cache_dtype, kv_cache_tokens=options.kv_cache_tokens)
    needed, staging = needed_bytes(fitted, dtype=weight_dtype, cache_bytes_per_device=cache_bytes, storage=storage)
    check_memory(needed, staging_bytes=staging)
    return LLM.from_params(fitted, random_params(fitted, storage), kv_cache_dtype=kv_cache_dtype, **engine)


def random_params(config: ModelConfig, storage: Storage) -> DecoderParams:
    """Random weights, kept as ``storage`` says, in memory of the same kind as a checkpoint's: the kind decides how fast a CPU reads it."""
    if config.partition.platform != "cpu" and not storage.policy.rules:
        return jax.block_until_ready(init_params(config, 0, storage.dtype))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return map_specs(lambda name, spec: _random_param(config, storage, name, spec, pool), param_specs(config))


def _random_param(config: ModelConfig, storage: Storage, name: str, spec: ParamSpec, pool: concurrent.futures.Executor):
    def rows(first: int, last: int, dtype: np.dtype) -> np.ndarray:
        rng = np.random.default_rng([zlib.crc32(name.encode()), first])
        shape = (last - first, *spec.shape[1:])
        return np.ones(shape, dtype) if spec.init == "ones" else (rng.standard_normal(shape, np.float32) / math.sqrt(spec.shape[-1])).astype(dtype)
    layout = storage.layout(spec.shape, spec.axes, config.partition, name=name)
    if layout is not None:
        return make_matrix(layout, lambda first, last: rows(first, last, layout.source_dtype), pool)
    return place(spec.shape, config.partition.sharding(spec.axes, shape=spec.shape, name=name), dtype=storage.dtype,
                 fill=lambda buffers: fill_by_rows(buffers, lambda first, last: rows(first, last, storage.dtype)))
