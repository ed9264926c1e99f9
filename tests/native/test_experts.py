"""The experts' gated MLPs in one call: each row as its own expert's MLP alone gives it, to the bit, and what does not fit is an error."""
import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_mlp import ClampedGlu
from sharding_rules import ONE_DEVICE
from tpllm.checkpoint.placement import make_matrix
from tpllm.model.stacks import Stack
from tpllm.weights import native_products as products
from tpllm.weights.policy import parse_policy
from tpllm.weights.storage import NATIVE, Storage

pytestmark = pytest.mark.usefixtures("native_library")

NUM_EXPERTS, D, F = 5, 48, 40
SCHEMES = [None, "int8", "w8a8", "*=int4", "q4_k", "fp8"]
CLAMPED = ClampedGlu(0.8, 1.702)
COUNTS = [[3, 0, 1, 7, 2], [0, 0, 13, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]


def packed(name, rows, scheme):
    layout = Storage(np.dtype(np.float32), parse_policy(scheme), device=NATIVE).layout(rows.shape, (None, None), ONE_DEVICE, name=name)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return make_matrix(layout, lambda first, last: rows[first:last].astype(layout.source_dtype), pool)


@functools.cache
def matrices(scheme):
    """((gate, up, down) of each expert, and the three stacks)."""
    rng, alone, stacked = np.random.default_rng(0), [[] for _ in range(NUM_EXPERTS)], []
    for name, (num_rows, num_inputs) in {"gate": (F, D), "up": (F, D), "down": (D, F)}.items():
        weights = rng.standard_normal((NUM_EXPERTS, num_rows, num_inputs), np.float32) / np.sqrt(num_inputs)
        stack = Stack(NUM_EXPERTS, num_rows)
        rows = np.zeros((stack.stored_rows, num_inputs), np.float32)
        for stored, expert, start, stop in stack.runs(0, stack.stored_rows):
            rows[stored:stored + stop - start] = weights[expert, start:stop]
        stacked.append(packed(name, rows, scheme))
        for expert, weight in enumerate(weights):
            alone[expert].append(packed(name, weight, scheme))
    return alone, stacked


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_each_row_is_its_experts_alone_to_the_bit(instruction_set, scheme, counts, dtype):
    alone, stacked = matrices(scheme)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((16, D), np.float32)).astype(dtype)
    out, first = products.expert_mlps(x, jnp.asarray(counts, jnp.int32), stacked, activation="silu", inner_size=F), 0
    for expert, count in enumerate(counts):
        for row in range(first, first + count):
            expected = products.gated_mlp(x[row:row + 1], alone[expert], (None,) * 3, activation="silu")
            assert np.asarray(out[row]).tobytes() == np.asarray(expected[0]).tobytes(), (expert, row)
        first += count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", [None, "*=int4"], ids=str)
def test_each_expert_adds_its_own_biases(instruction_set, scheme, dtype):
    alone, stacked = matrices(scheme)
    rng, counts, steps = np.random.default_rng(2), COUNTS[0], (64, 64, 64)  # 40 and 48 rows to multiples of 32; what is beyond is read by no one
    biases = [np.full((NUM_EXPERTS, step), np.nan, np.float32) for step in steps]
    for bias, size in zip(biases, (F, F, D), strict=True):
        bias[:, :size] = rng.standard_normal((NUM_EXPERTS, size))
    x = jnp.asarray(rng.standard_normal((16, D), np.float32)).astype(dtype)
    out, first = products.expert_mlps(x, jnp.asarray(counts, jnp.int32), stacked, [jnp.asarray(bias.reshape(-1)).astype(dtype) for bias in biases],
                                      activation=CLAMPED, inner_size=F), 0
    for expert, count in enumerate(counts):
        own = [jnp.asarray(bias[expert, :size]).astype(dtype) for bias, size in zip(biases, (F, F, D), strict=True)]
        expected = products.gated_mlp(x[first:first + count], alone[expert], own, activation=CLAMPED)
        assert np.asarray(out[first:first + count]).tobytes() == np.asarray(expected).tobytes(), expert
        first += count


@pytest.mark.parametrize("counts", [[9, 9, 0, 0, 0], [-1, 0, 0, 0, 0], [2**31 - 1, 1, 0, 0, 0]], ids=str)
def test_more_rows_than_there_are_is_an_error(counts):
    x = jnp.zeros((16, D))
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="the experts have more rows than there are"):
        jax.block_until_ready(products.expert_mlps(x, jnp.asarray(counts, jnp.int32), matrices(None)[1], activation="silu", inner_size=F))


@pytest.mark.parametrize(("num_experts", "inner_size", "width"), [(4, F, D), (5, F + 32, D), (5, 0, D), (5, F, D + 1)])
def test_shapes_that_do_not_match_are_errors(num_experts, inner_size, width):
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="the shapes of experts do not match"):
        jax.block_until_ready(products.expert_mlps(jnp.zeros((3, width)), jnp.zeros(num_experts, jnp.int32), matrices(None)[1], activation="silu",
                                                   inner_size=inner_size))
