"""The KV cache: pages, behind three verbs: init here, append and attend in ``ops.cached_attention``.

A page table says in which pages a row's tokens lie; without one, row b is page b, as long as a row can get. The token at position s is entry
s of its row, so a row's length needs no storage: a query at position p sees entries 0 to p.
"""
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from sharding_rules.axes import BATCH
from tpllm import ops
from tpllm.model.config import ModelConfig


@struct.dataclass
class KVCache:
    """Keys and values of every layer, each its own array so that a donated cache is updated in place.

    Attributes:
        keys, values: a tuple over layers of [P, K, S, H]: pages, stored KV heads, tokens of a page, head dim.
        key_scales, value_scales: of int8 and float8_e4m3fn ones: a tuple over layers of float32 [P, K, S], one scale a head and token; else empty.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    key_scales: tuple[jax.Array, ...] = ()
    value_scales: tuple[jax.Array, ...] = ()

    def layer(self, index: int) -> tuple[jax.Array, ...]:
        """The arrays of one layer: keys, values and, where there are, their scales."""
        return tuple(arrays[index] for arrays in (self.keys, self.values, self.key_scales, self.value_scales) if arrays)

    @classmethod
    def of_layers(cls, layers: Sequence[tuple[jax.Array, ...]]) -> "KVCache":
        """The cache whose :meth:`layer` gives these."""
        return cls(*zip(*layers, strict=True))

    @property
    def num_pages(self) -> int:
        """P."""
        return self.keys[0].shape[0]

    @property
    def page_size(self) -> int:
        """S, the tokens a page holds."""
        return self.keys[0].shape[2]


def init_cache(config: ModelConfig, batch_size: int, max_len: int, dtype=jnp.float32) -> KVCache:
    """An empty cache, sharded on KV heads (and rows, under a data axis) as ``config.partition`` says.

    Args:
        config: the model.
        batch_size: pages; rows, where each has one.
        max_len: tokens a page holds.
        dtype: of keys and values; int8 and float8_e4m3fn have scales beside them.

    Raises:
        ShardingError: a data axis that does not divide ``batch_size``.
    """
    shape = (batch_size, config.stored_kv_heads, max_len, config.head_dim)
    sharding = config.partition.sharding(ops.CACHE_AXES, shape=shape, name="kv_cache")
    scale_sharding = config.partition.sharding(ops.SCALE_AXES, shape=shape[:3], name="kv_cache scales")

    def zeros_of_layers(shape, dtype, sharding):
        zeros = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)
        return tuple(zeros(shape, jnp.dtype(dtype)) for _ in range(config.num_layers))
    codes = ((shape, dtype, sharding),) * 2
    scales = ((shape[:3], jnp.float32, scale_sharding),) * 2 if ops.has_scales(dtype) else ()
    return KVCache(*(zeros_of_layers(*one) for one in (*codes, *scales)))


def cache_bytes_per_device(config: ModelConfig, batch_size: int, max_len: int, dtype=jnp.float32) -> int:
    """Bytes of the cache's shard on each device of ``config.partition``."""
    shape = (batch_size, config.stored_kv_heads, max_len, config.head_dim)
    shape = config.partition.sharding(ops.CACHE_AXES, shape=shape, name="kv_cache").shard_shape(shape)
    scale_bytes = 4 * math.prod(shape[:3]) if ops.has_scales(dtype) else 0
    return 2 * config.num_layers * (math.prod(shape) * jnp.dtype(dtype).itemsize + scale_bytes)


def cache_bytes_per_token(config: ModelConfig, dtype=jnp.float32) -> float:
    """Bytes that the cache takes for a token of a row, on all devices of ``config.partition`` together."""
    num_groups = config.partition.size(BATCH)
    return cache_bytes_per_device(config, num_groups, 1, dtype) * config.partition.num_devices / num_groups
