"""Random weights made where they are used: drawing eight billion numbers on the host would take longer than measuring."""
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpllm.model.config import ModelConfig
from tpllm.model.params import DecoderParams, abstract_params, named_leaves, param_specs
from tpllm.weights.storage import Storage


def device_params(config: ModelConfig, storage: Storage) -> DecoderParams:
    """Random parameters of about the spread that :func:`.init_params` gives, each made in its sharding on the device.

    Codes are drawn and not quantized, and scales are alike: speed depends on neither.

    Args:
        config: fitted to its mesh.
        storage: how matrices are kept: plain, quantized, or for an accelerator's kernels, not for the native ones of CPUs.
    """
    specs = dict(named_leaves(param_specs(config)))

    def make(index: int, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        spec = specs.get(name) or specs[name.rpartition(".")[0]]
        draw = jax.jit(_draw, static_argnums=(1, 2, 3, 4), out_shardings=leaf.sharding)
        return draw(jax.random.key(index), leaf.shape, np.dtype(leaf.dtype), name.rpartition(".")[2], spec)
    abstract = abstract_params(config, storage.dtype, storage)
    leaves = [make(index, name, leaf) for index, (name, leaf) in enumerate(named_leaves(abstract))]
    return jax.block_until_ready(jax.tree.unflatten(jax.tree.structure(abstract), leaves))


def _draw(key: jax.Array, shape: tuple[int, ...], dtype: np.dtype, array: str, spec: Any) -> jax.Array:
    std = 0.02 if spec.init == "embedding" else 1 / math.sqrt(spec.shape[-1])
    if array == "scales":
        return jnp.full(shape, std / 64, dtype)  # codes of a byte have a spread of 73, smaller ones less
    if jnp.issubdtype(dtype, jnp.integer):  # codes, alone or several in a word
        return jax.random.bits(key, shape, f"uint{8 * dtype.itemsize}").astype(dtype)
    if array == "codes":
        return (jax.random.normal(key, shape, jnp.float32) * 64).astype(dtype)
    if spec.init in ("ones", "zeros"):
        return getattr(jnp, spec.init)(shape, dtype)
    return (jax.random.normal(key, shape, jnp.float32) * std).astype(dtype)
