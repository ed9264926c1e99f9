"""What XLA makes of the backbone on a mesh: its collectives, what it copies, and that the cache stays where it is."""
import dataclasses
import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.page_table import PageTable, one_page_a_row
from sharding_rules import DATA_TENSOR, TENSOR, make_mesh
from tpllm import ops
from tpllm.aot.hlo import replica_groups
from tpllm.aot.report import CompiledProgram, compile_lowered
from tpllm.model.config import ALL_LAYERS, ModelConfig
from tpllm.model.decoder import forward
from tpllm.model.kv_cache import init_cache
from tpllm.model.params import abstract_params
from tpllm.model.partition import fit_to_mesh

# Sizes such that every shard of a weight is larger than any activation, and the cache larger than both.
CONFIG = ModelConfig(vocab_size=2048, hidden_size=128, num_layers=2, num_heads=16, num_kv_heads=8, head_dim=16, intermediate_size=256,
                     max_position=1024)
NUM_ROWS, MAX_LEN, CHUNK = 4, 1024, 4
PAGE_SIZE = 64
MOVERS = ("copy", "transpose", "concatenate", "pad", "reverse", "gather", "all-gather")


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The compiled backbone of a model."""

    config: ModelConfig
    program: CompiledProgram

    def collectives(self):
        return [found.op for found in self.program.collectives]

    def found(self, ops=None, *, min_elements, dtype=None):
        """Instructions, those inside fusions and loops included, whose result is that large."""
        return [found.line.strip() for found in self.program.instructions if (ops is None or found.op in ops)
                and found.largest.num_elements >= min_elements and dtype in (None, found.largest.dtype)]


@functools.cache
def compiled(num_tokens, *, dp=1, tp=1, num_heads=16, num_kv_heads=8, dtype="float32"):
    """The backbone: one token for every row, or a chunk of one row."""
    config = dataclasses.replace(CONFIG, num_heads=num_heads, num_kv_heads=num_kv_heads)
    config = fit_to_mesh(config, make_mesh({"dp": dp, "tp": tp}), DATA_TENSOR if dp > 1 else TENSOR)
    cache = init_cache(config, NUM_ROWS, MAX_LEN, jnp.dtype(dtype))
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    batch = NUM_ROWS if num_tokens == 1 else 1
    table = None if num_tokens == 1 else PageTable(ints((NUM_ROWS, 1)), ints((1,)))
    program = jax.jit(functools.partial(forward, config=config, output="hidden"), donate_argnums=3)
    lowered = program.lower(abstract_params(config, jnp.dtype(dtype)), ints((batch, num_tokens)), ints((batch, num_tokens)), cache,
                            tables=table and {ALL_LAYERS: table})
    return Backbone(config, compile_lowered(lowered))


def smallest_matrix_shard(config):
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config, jnp.float32)) if leaf.ndim == 2]
    return min(map(math.prod, shapes))


def cache_shard(config):
    parts = config.partition.size("kv_heads") * config.partition.size("batch")
    return NUM_ROWS * config.stored_kv_heads * MAX_LEN * config.head_dim // parts


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("num_tokens", [1, CHUNK])
def test_the_backbone_makes_two_all_reduces_a_layer_and_one_for_the_embedding(num_tokens, tp):
    assert compiled(num_tokens, tp=tp).collectives() == ["all-reduce"] * (2 * CONFIG.num_layers + 1)


@pytest.mark.parametrize("num_tokens", [1, CHUNK])
def test_replicated_attention_leaves_one_all_reduce_a_layer(num_tokens):
    backbone = compiled(num_tokens, tp=4, num_heads=6, num_kv_heads=3)
    assert backbone.config.partition.size("heads") == 1
    assert backbone.collectives() == ["all-reduce"] * (CONFIG.num_layers + 1)


def test_one_device_needs_no_collective():
    assert compiled(1, tp=1).collectives() == []


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("num_tokens", [1, CHUNK])
def test_nothing_as_large_as_a_weight_is_moved_and_nothing_as_large_as_the_cache_is_rewritten(num_tokens, tp):
    backbone = compiled(num_tokens, tp=tp)
    assert backbone.found(MOVERS, min_elements=smallest_matrix_shard(backbone.config)) == []
    assert backbone.found(("select", "convert", "broadcast"), min_elements=cache_shard(backbone.config)) == []


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_kv_heads_fewer_than_shards_are_not_gathered(num_kv_heads):
    backbone = compiled(1, tp=8, num_kv_heads=num_kv_heads)
    assert backbone.config.stored_kv_heads == 8
    assert backbone.collectives() == ["all-reduce"] * (2 * CONFIG.num_layers + 1)


@pytest.mark.parametrize(("num_tokens", "dtype"), [(1, "bfloat16"), (CHUNK, "bfloat16"), (1, "float16")])
def test_a_16_bit_cache_is_neither_upcast_nor_copied(num_tokens, dtype):
    backbone = compiled(num_tokens, tp=2, dtype=dtype)
    size = cache_shard(backbone.config)
    assert backbone.found(min_elements=size, dtype="f32") == []
    assert backbone.found((*MOVERS, "select", "convert"), min_elements=size) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_tokens", [1, CHUNK])
def test_every_cache_buffer_is_aliased_and_stays_at_its_address(num_tokens, dtype):
    backbone = compiled(num_tokens, tp=2, dtype=dtype)
    num_buffers = 2 * CONFIG.num_layers
    assert backbone.program.num_aliased == num_buffers
    params = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding),
                          abstract_params(backbone.config, jnp.dtype(dtype)))
    cache = init_cache(backbone.config, NUM_ROWS, MAX_LEN, jnp.dtype(dtype))
    before = pointers(cache)
    shape = (NUM_ROWS, 1) if num_tokens == 1 else (1, num_tokens)
    positions = np.broadcast_to(np.arange(num_tokens, dtype=np.int32), shape)
    table = None if num_tokens == 1 else one_page_a_row(NUM_ROWS, np.full(1, 2, np.int32))
    _, cache = backbone.program.executable(params, np.zeros(shape, np.int32), positions, cache, tables=table and {ALL_LAYERS: table})
    assert pointers(cache) == before
    assert len(set(before)) == 2 * num_buffers


@functools.cache
def compiled_over_pages(call, *, dtype="float32", is_native=True):
    """The backbone at tp 2 over a pool of pages as large as the padded cache, its table an argument: one token for every row, a chunk of one row,
    or one of several rows."""
    config = fit_to_mesh(CONFIG, make_mesh({"tp": 2}), TENSOR)
    cache = init_cache(config, NUM_ROWS * MAX_LEN // PAGE_SIZE, PAGE_SIZE, jnp.dtype(dtype))
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    tokens = ints((NUM_ROWS, 1) if call == "decode" else (1, CHUNK))
    rows = {"decode": None, "chunk": ints((1,)), "ragged": ints((1, CHUNK))}[call]
    program = jax.jit(functools.partial(forward, config=config, output="hidden"), donate_argnums=3)
    with mock.patch.object(ops, "uses_native", ops.uses_native if is_native else lambda _: False):
        lowered = program.lower(abstract_params(config, jnp.dtype(dtype)), tokens, tokens, cache,
                                tables={ALL_LAYERS: PageTable(ints((NUM_ROWS, MAX_LEN // PAGE_SIZE)), rows)})
    return Backbone(config, compile_lowered(lowered))


@pytest.mark.parametrize("is_native", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize(("call", "dtype"), [
    *((call, dtype) for call in ("decode", "chunk", "ragged") for dtype in ("float32", "bfloat16")), ("decode", "float16")])
def test_no_buffer_of_a_paged_cache_is_copied_or_upcast_and_all_are_aliased(call, dtype, is_native):
    backbone = compiled_over_pages(call, dtype=dtype, is_native=is_native)
    assert backbone.program.num_aliased == 2 * CONFIG.num_layers
    size = cache_shard(backbone.config)
    assert backbone.found((*MOVERS, "select", "convert"), min_elements=size) == []
    if dtype != "float32":
        assert backbone.found(min_elements=size, dtype="f32") == []
    assert backbone.collectives() == ["all-reduce"] * (2 * CONFIG.num_layers + 1)


@pytest.mark.parametrize("call", ["decode", "chunk", "ragged"])
def test_the_pool_of_a_paged_cache_stays_at_its_address(call):
    backbone = compiled_over_pages(call)
    params = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), abstract_params(backbone.config, jnp.float32))
    cache = init_cache(backbone.config, NUM_ROWS * MAX_LEN // PAGE_SIZE, PAGE_SIZE)
    before = pointers(cache)
    pages_RL = np.random.default_rng(0).permutation(NUM_ROWS * MAX_LEN // PAGE_SIZE).reshape(NUM_ROWS, -1).astype(np.int32)
    shape, rows = {"decode": ((NUM_ROWS, 1), None), "chunk": ((1, CHUNK), np.full(1, 2, np.int32)),
                   "ragged": ((1, CHUNK), np.array([[2, 2, 0, 3]], np.int32))}[call]
    positions = np.broadcast_to(np.arange(60, 60 + shape[1], dtype=np.int32), shape)
    _, cache = backbone.program.executable(params, np.zeros(shape, np.int32), positions, cache, tables={ALL_LAYERS: PageTable(pages_RL, rows)})
    assert pointers(cache) == before


def pointers(cache):
    return [shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache) for shard in leaf.addressable_shards]


def test_decode_on_a_data_and_tensor_mesh_reduces_inside_each_data_group_only():
    backbone = compiled(1, dp=2, tp=4)
    assert backbone.collectives() == ["all-reduce"] * (2 * CONFIG.num_layers + 1)
    groups = {group for found in backbone.program.collectives for group in replica_groups(found.line)}
    assert groups == {frozenset(range(4)), frozenset(range(4, 8))}
    assert backbone.found(MOVERS, min_elements=smallest_matrix_shard(backbone.config)) == []
