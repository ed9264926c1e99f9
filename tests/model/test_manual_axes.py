"""A step of the decoder inside a ``shard_map`` that is manual over one more axis, as a pipeline's stages are; the rest is left to the partitioner."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.page_table import PageTable
from sharding_rules import DATA_TENSOR
from tpllm import ops
from tpllm.bench.shapes import random_params
from tpllm.model.config import ModelConfig
from tpllm.model.decoder import forward
from tpllm.model.kv_cache import init_cache
from tpllm.model.partition import fit_to_mesh
from tpllm.model.sampling import score
from tpllm.weights.policy import parse_policy
from tpllm.weights.storage import NATIVE, Storage

CONFIG = ModelConfig(vocab_size=258, hidden_size=64, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=128, max_position=64,
                     has_qkv_bias=True, has_mlp_bias=True)
SPARSE = dataclasses.replace(CONFIG, num_experts=4, num_experts_per_token=2, expert_size=64, has_expert_bias=True)
NORMED = dataclasses.replace(CONFIG, has_qk_norm=True, qk_norm_spans_heads=True, norm="layer", has_qkv_bias=False)
NUM_STAGES, NUM_ROWS, NUM_TOKENS, PAGE = 2, 4, 6, 16
CASES = {"dense": (CONFIG, None), "int4": (CONFIG, "int4"), "experts": (SPARSE, "int8"),
         "outliers": (CONFIG, "llm.int8"), "cut norms": (NORMED, "int8")}
IN_XLA = ("outliers", "cut norms")
"""Here XLA computes some steps between products, and in bfloat16 it rounds them or not (``xla_allow_excess_precision``), as it fuses them."""


def mesh_of(sizes):
    num_devices = int(np.prod(list(sizes.values())))
    return Mesh(np.array(jax.devices()[:num_devices]).reshape(*sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def model_on(sizes, case, dtype, *, is_packed):
    config, scheme = CASES[case]
    fitted = fit_to_mesh(config, mesh_of(sizes), DATA_TENSOR)
    return fitted, random_params(fitted, Storage(np.dtype(dtype), parse_policy(scheme), device=NATIVE if is_packed else None))


def step(config, params, tokens, cache):
    """(log probabilities of the next token, the cache): what every sum of a step goes into."""
    pages = jnp.arange(NUM_ROWS // config.partition.size("batch"), dtype=jnp.int32)[:, None]
    positions = jnp.broadcast_to(jnp.arange(NUM_TOKENS, dtype=jnp.int32), tokens.shape)
    table = PageTable(jnp.tile(pages, (config.partition.size("batch"), 1)))
    logits, cache = forward(params, tokens, positions, cache, config, tables=dict.fromkeys(config.layer_groups, table))
    return score(logits[:, -1], tokens[:, 0], jnp.full(NUM_ROWS, 3), partition=config.partition), cache


def steps(case, sizes, dtype, *, is_packed):
    """(what each stage gives for its own rows, what the plain mesh gives for them), leaf by leaf."""
    tokens = np.random.default_rng(3).integers(0, CONFIG.vocab_size, (NUM_STAGES, NUM_ROWS, NUM_TOKENS)).astype(np.int32)
    config, params = model_on(sizes, case, dtype, is_packed=is_packed)
    plain = jax.jit(functools.partial(step, config))
    expected = [plain(params, group, init_cache(config, NUM_ROWS, PAGE, dtype)) for group in tokens]
    staged, staged_params = model_on({"pp": NUM_STAGES, **sizes}, case, dtype, is_packed=is_packed)

    def stage(params, tokens, cache):
        return jax.tree.map(lambda x: x[None], step(staged, params, tokens[0], cache))
    run = jax.jit(jax.shard_map(stage, mesh=staged.partition.mesh, in_specs=(P(), P("pp"), P()), out_specs=P("pp"), axis_names={"pp"},
                                check_vma=False))
    found = run(staged_params, tokens, init_cache(staged, NUM_ROWS, PAGE, dtype))
    return [(np.asarray(leaf), np.stack(others)) for leaf, *others in zip(*map(jax.tree.leaves, (found, *expected)), strict=True)]


@pytest.mark.parametrize(("case", "sizes"), [
    *((case, sizes) for case in CASES for sizes in ({"dp": 1, "tp": 1}, {"dp": 2, "tp": 2})),
    ("dense", {"dp": 1, "tp": 2}), ("experts", {"dp": 1, "ep": 2, "tp": 2}),
], ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value.values())))
def test_a_step_of_native_kernels_within_a_manual_axis_has_the_bits_of_one_on_the_plain_mesh(native_library, case, sizes):
    for found, expected in steps(case, sizes, jnp.float32 if case in IN_XLA else jnp.bfloat16, is_packed=True):
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("case", ["dense", "int4", "experts"])
def test_a_step_of_xla_within_a_manual_axis_is_close_to_one_on_the_plain_mesh(monkeypatch, case):
    monkeypatch.setattr(ops, "uses_native", lambda _: False)
    for found, expected in steps(case, {"dp": 2, "tp": 2}, jnp.float32, is_packed=False):
        np.testing.assert_allclose(found, expected, atol=1e-4)
