"""The KV cache: one padded page a row, behind three verbs: init here, append and attend in ``ops.cached_attention``.

Entry s of a row is the token at position s, so a row's length needs no storage: a query at position p sees entries 0 to p.
"""
import math

import jax
import jax.numpy as jnp
from flax import struct

from tpllm import ops
from tpllm.model.config import ModelConfig


@struct.dataclass
class KVCache:
    """Keys and values of every layer, each its own array so that a donated cache is updated in place.

    Attributes:
        keys, values: a tuple over layers of [P, K, S, H]: rows, stored KV heads, positions, head dim.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @property
    def max_len(self) -> int:
        """S, the positions a row holds."""
        return self.keys[0].shape[2]


def init_cache(config: ModelConfig, batch_size: int, max_len: int, dtype=jnp.float32) -> KVCache:
    """An empty cache, sharded on KV heads (and rows, under a data axis) as ``config.partition`` says.

    Args:
        config: the model.
        batch_size: rows.
        max_len: positions a row can hold.
        dtype: of keys and values.

    Raises:
        ShardingError: a data axis that does not divide ``batch_size``.
    """
    shape = (batch_size, config.stored_kv_heads, max_len, config.head_dim)
    sharding = config.partition and config.partition.sharding(ops.CACHE_AXES, shape=shape, name="kv_cache")
    zeros = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
    return KVCache(keys=tuple(zeros() for _ in range(config.num_layers)), values=tuple(zeros() for _ in range(config.num_layers)))


def cache_bytes_per_device(config: ModelConfig, batch_size: int, max_len: int, dtype=jnp.float32) -> int:
    """Bytes of the cache's shard on each device of ``config.partition``."""
    shape = (batch_size, config.stored_kv_heads, max_len, config.head_dim)
    if config.partition is not None:
        shape = config.partition.sharding(ops.CACHE_AXES, shape=shape, name="kv_cache").shard_shape(shape)
    return 2 * config.num_layers * math.prod(shape) * jnp.dtype(dtype).itemsize
