"""What XLA makes of the backbone on a mesh: its collectives, what it copies, and that the cache stays where it is."""
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding_rules import DATA_TENSOR, TENSOR, make_mesh
from tpllm.model.config import ModelConfig
from tpllm.model.decoder import forward
from tpllm.model.kv_cache import init_cache
from tpllm.model.params import abstract_params
from tpllm.model.partition import fit_to_mesh

# Sizes such that every shard of a weight is larger than any activation, and the cache larger than both.
CONFIG = ModelConfig(vocab_size=2048, hidden_size=128, num_layers=2, num_heads=16, num_kv_heads=8, head_dim=16, intermediate_size=256,
                     max_position=1024)
NUM_ROWS, MAX_LEN, CHUNK = 4, 1024, 4
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")
MOVERS = ("copy", "transpose", "concatenate", "pad", "reverse", "gather", "all-gather")
INSTRUCTION = re.compile(r"= \(?(\w+)\[([\d,]*)\]\S* (?:[^=()]*\) )?([a-z-]+?)(?:-start)?\(")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program, its optimized HLO and the model it runs."""

    config: ModelConfig
    executable: jax.stages.Compiled
    text: str

    @property
    def instructions(self):
        """(op, dtype, elements of its first result) of every instruction, those inside fusions and loops included."""
        return [(op, dtype, math.prod(map(int, filter(None, dims.split(","))))) for dtype, dims, op in INSTRUCTION.findall(self.text)]

    def collectives(self):
        return [op for op, _, _ in self.instructions if op in COLLECTIVES]


@functools.cache
def compiled(num_tokens, *, dp=1, tp=1, num_heads=16, num_kv_heads=8, dtype="float32"):
    """The backbone: one token for every row, or a chunk of one row."""
    config = dataclasses.replace(CONFIG, num_heads=num_heads, num_kv_heads=num_kv_heads)
    config = fit_to_mesh(config, make_mesh({"dp": dp, "tp": tp}), DATA_TENSOR if dp > 1 else TENSOR)
    cache = init_cache(config, NUM_ROWS, MAX_LEN, jnp.dtype(dtype))
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    batch = NUM_ROWS if num_tokens == 1 else 1
    rows = None if num_tokens == 1 else ints((1,))
    program = jax.jit(functools.partial(forward, config=config, output="hidden"), donate_argnums=3)
    executable = program.lower(abstract_params(config, jnp.dtype(dtype)), ints((batch, num_tokens)), ints((batch, num_tokens)), cache,
                               rows_B=rows).compile()
    return Compiled(config, executable, executable.as_text())


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
    program = compiled(num_tokens, tp=4, num_heads=6, num_kv_heads=3)
    assert program.config.partition.size("heads") == 1
    assert program.collectives() == ["all-reduce"] * (CONFIG.num_layers + 1)


def test_one_device_needs_no_collective():
    assert compiled(1, tp=1).collectives() == []


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("num_tokens", [1, CHUNK])
def test_nothing_as_large_as_a_weight_is_moved_and_nothing_as_large_as_the_cache_is_rewritten(num_tokens, tp):
    program = compiled(num_tokens, tp=tp)
    assert [found for found in program.instructions if found[0] in MOVERS and found[2] >= smallest_matrix_shard(program.config)] == []
    rewritten = [found for found in program.instructions if found[0] in ("select", "convert", "broadcast") and
                 found[2] >= cache_shard(program.config)]
    assert rewritten == []


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_kv_heads_fewer_than_shards_are_not_gathered(num_kv_heads):
    program = compiled(1, tp=8, num_kv_heads=num_kv_heads)
    assert program.config.stored_kv_heads == 8
    assert program.collectives() == ["all-reduce"] * (2 * CONFIG.num_layers + 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("num_tokens", [1, CHUNK])
def test_a_16_bit_cache_is_neither_upcast_nor_copied(num_tokens, dtype):
    program = compiled(num_tokens, tp=2, dtype=dtype)
    size = cache_shard(program.config)
    assert [found for found in program.instructions if found[1] == "f32" and found[2] >= size] == []
    assert [found for found in program.instructions if found[0] in (*MOVERS, "select", "convert") and found[2] >= size] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_tokens", [1, CHUNK])
def test_every_cache_buffer_is_aliased_and_stays_at_its_address(num_tokens, dtype):
    program = compiled(num_tokens, tp=2, dtype=dtype)
    num_buffers = 2 * CONFIG.num_layers
    assert len(re.findall(r"\{\d+\}: \(\d+, \{\}, (?:may|must)-alias\)", program.text.splitlines()[0])) == num_buffers
    params = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding),
                          abstract_params(program.config, jnp.dtype(dtype)))
    cache = init_cache(program.config, NUM_ROWS, MAX_LEN, jnp.dtype(dtype))
    before = pointers(cache)
    shape = (NUM_ROWS, 1) if num_tokens == 1 else (1, num_tokens)
    positions = np.broadcast_to(np.arange(num_tokens, dtype=np.int32), shape)
    rows = None if num_tokens == 1 else np.full(1, 2, np.int32)
    _, cache = program.executable(params, np.zeros(shape, np.int32), positions, cache, rows_B=rows)
    assert pointers(cache) == before
    assert len(set(before)) == 2 * num_buffers


def pointers(cache):
    return [shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache) for shard in leaf.addressable_shards]


def test_decode_on_a_data_and_tensor_mesh_reduces_inside_each_data_group_only():
    program = compiled(1, dp=2, tp=4)
    assert program.collectives() == ["all-reduce"] * (2 * CONFIG.num_layers + 1)
    lines = [line for line in program.text.splitlines() if re.search(r" all-reduce(-start)?\(", line)]
    assert {group for line in lines for group in replica_groups(line)} == {frozenset(range(4)), frozenset(range(4, 8))}
    assert [found for found in program.instructions if found[0] in MOVERS and found[2] >= smallest_matrix_shard(program.config)] == []


def replica_groups(line):
    """The sets of devices of a collective, from any of the ways in which HLO writes them."""
    if lists := re.search(r"replica_groups=\{(\{[\d,{}]+\})\}", line):
        return [frozenset(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", lists[1])]
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return [frozenset(row) for row in device_ids(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2])).tolist()]
    mesh = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", line)
    axes = re.findall(r"'(\w+)'=(\d+)", mesh[1])
    sizes = [int(size) for _, size in axes]
    reduced = [index for index, (name, _) in enumerate(axes) if f"'{name}'" in mesh[4]]
    ids = device_ids(mesh[2] or ",".join(map(str, sizes)), mesh[3]).reshape(sizes)
    ids = np.moveaxis(ids, reduced, range(-len(reduced), 0))
    return [frozenset(row) for row in ids.reshape(-1, math.prod(ids.shape[-len(reduced):])).tolist()]


def device_ids(dims, permutation):
    """Consecutive ids in an array of ``dims``, transposed: XLA's iota tile assignment."""
    dims = [int(dim) for dim in dims.split(",")]
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose([int(axis) for axis in permutation.split(",")]) if permutation else ids


def test_a_gathered_and_copied_array_would_be_seen():
    mesh = make_mesh({"tp": 2})
    split = jax.NamedSharding(mesh, jax.P("tp"))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=split)
    text = jax.jit(lambda x: (x.T, x), out_shardings=(split, jax.NamedSharding(mesh, jax.P()))).lower(x).compile().as_text()
    found = Compiled(CONFIG, None, text).instructions
    assert ("all-gather", "f32", 64 * 32) in found
    assert any(op in ("copy", "transpose") and size >= 16 * 64 for op, _, size in found)
