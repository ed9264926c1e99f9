"""Packed products on a mesh against one device, and what XLA makes of them."""
import concurrent.futures
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding_rules import DATA_TENSOR, ONE_DEVICE, Partition, make_mesh
from tpllm.checkpoint.placement import make_matrix
from tpllm.weights.linear import gated_mlp, linear, linears, lookup
from tpllm.weights.policy import parse_policy
from tpllm.weights.storage import NATIVE, Storage

pytestmark = pytest.mark.usefixtures("native_library")

D, F, V = 128, 512, 264
KINDS = ["float32", "bfloat16", "int8", "int4"]
MESHES = [{"tp": 2}, {"tp": 4}, {"dp": 2, "tp": 2}]
SHAPES = {"up": ((F, D), ("mlp", "embed")), "gate": ((F, D), ("mlp", "embed")), "down": ((D, F), ("embed", "mlp")),
          "table": ((V, D), ("vocab", "embed"))}


@functools.cache
def matrices(kind, mesh=()):
    """Packed matrices of the same numbers on a mesh, or on one device."""
    partition = Partition(make_mesh(dict(mesh)), DATA_TENSOR) if mesh else ONE_DEVICE
    storage = Storage(jnp.dtype("bfloat16" if kind == "bfloat16" else "float32"), parse_policy(kind if "int" in kind else None), device=NATIVE)
    made = {}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for seed, (name, (shape, axes)) in enumerate(SHAPES.items()):
            rows = np.random.default_rng(seed).standard_normal(shape, np.float32) / np.sqrt(shape[1])
            layout = storage.layout(shape, axes, partition, name=name)
            made[name] = make_matrix(layout, lambda first, last, rows=rows, layout=layout: rows[first:last].astype(layout.source_dtype), pool)
    return made


def on_mesh(mesh):
    return tuple(mesh.items())


def inputs(width, batch=4, length=3):
    return jnp.asarray(np.random.default_rng(9).standard_normal((batch, length, width), np.float32))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_column_parallel_product_is_bit_equal_to_one_device(kind, mesh):
    run = jax.jit(lambda x, up, gate, bias: linears(x, (up, gate), (bias, None)))
    x, bias = inputs(D), jnp.linspace(-1, 1, F)
    alone, cut = (run(x, made["up"], made["gate"], bias) for made in (matrices(kind), matrices(kind, on_mesh(mesh))))
    assert [np.asarray(out).tobytes() for out in alone] == [np.asarray(out).tobytes() for out in cut]
    assert {shard.data.shape[-1] for shard in cut[0].addressable_shards} == {F // mesh["tp"]}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_parallel_product_adds_up_to_that_of_one_device_and_its_bias_once(kind, mesh):
    run = jax.jit(lambda x, down, bias: linear(x, down, bias))
    x, bias = inputs(F), jnp.linspace(-30, 30, D)
    np.testing.assert_allclose(run(x, matrices(kind, on_mesh(mesh))["down"], bias), run(x, matrices(kind)["down"], bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_mlp_on_a_mesh_is_that_of_one_device(kind, mesh):
    run = jax.jit(lambda x, weights, biases: gated_mlp(x, weights, biases, activation="silu"))
    x, biases = inputs(D), (jnp.linspace(-1, 1, F), None, jnp.linspace(-30, 30, D))
    alone, cut = (run(x, tuple(made[name] for name in ("gate", "up", "down")), biases) for made in (matrices(kind), matrices(kind, on_mesh(mesh))))
    np.testing.assert_allclose(cut, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_lookup_on_a_mesh_is_bit_equal_and_clips_ids(kind, mesh):
    run = jax.jit(lambda tokens, table: lookup(tokens, table, jnp.float32))
    tokens = jnp.array([[0, V - 1, V], [V // 2, V // 4, -1], [65, 66, 131], [132, 1, 2**31 - 1]], jnp.int32)
    alone, cut = (run(tokens, made["table"]) for made in (matrices(kind), matrices(kind, on_mesh(mesh))))
    assert np.asarray(alone).tobytes() == np.asarray(cut).tobytes()
    np.testing.assert_array_equal(alone[0, 1], alone[0, 2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", [{}, {"tp": 2}], ids=str)
def test_no_compiled_product_holds_an_array_of_the_weights_dense_size(kind, dtype, mesh):
    made = matrices(kind, on_mesh(mesh))

    def run(x, made):
        inner = linear(x, made["up"])
        return linear(inner, made["down"]), gated_mlp(x, (made["gate"], made["up"], made["down"]), (None,) * 3, activation="silu")
    text = jax.jit(run).lower(inputs(D).astype(dtype), made).compile().as_text()
    sizes = {(element, int(np.prod([int(size) for size in dims.split(",")]))) for element, dims in re.findall(r"\b([a-z]+\d+)\[([\d,]+)\]", text)}
    assert not [found for found in sizes if found[0] != "u8" and found[1] >= D * F // mesh.get("tp", 1)]
    assert not re.findall(r" u8\[[^=]*\] (?:copy|fusion|transpose|convert|all-gather)\(", text)
