"""Weights packed for the kernels of accelerators hold the numbers of the canonical arrays, on one device and cut over several.

The devices here are CPUs, so what multiplies is the reference of the packed form; the kernels have tests of their own.
"""
import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tiling import Device
from sharding_rules import DATA_TENSOR, ONE_DEVICE, Partition, make_mesh
from tests.pallas_kernels import hidden_triton
from tests.support.tiny_models import step
from tpllm.bench.shapes import find_shape, random_params
from tpllm.checkpoint.placement import make_matrix
from tpllm.model.kv_cache import init_cache
from tpllm.model.params import abstract_params
from tpllm.model.partition import fit_to_mesh
from tpllm.weights.accelerator import AcceleratorWeight
from tpllm.weights.linear import linear, lookup
from tpllm.weights.policy import parse_policy
from tpllm.weights.storage import Storage
from tpllm.weights.xla import XlaWeight

DEVICES = {"tpu": Device("tpu", "TPU v5 lite"),
           "hopper": Device("gpu", "NVIDIA H200", (9, 0)),
           "older": Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0))}
SCHEMES = ["int8", "int4", "fp8", "w8a8", "q4_k", "llm.int8"]
CUTS = {"alone": None, "columns": ("mlp", "embed"), "rows": ("embed", "mlp")}
N, K = 192, 512


def matrix(scheme, device, cut, *, name="w", shape=(N, K)):
    """The same random matrix, packed for a device or canonical where that is None."""
    partition = ONE_DEVICE if CUTS[cut] is None else Partition(make_mesh({"tp": 2}), DATA_TENSOR)
    storage = Storage(np.dtype(np.float32), parse_policy(scheme), device=device and DEVICES[device])
    layout = storage.layout(shape, CUTS[cut] or (None, None), partition, name=name)
    rows = np.random.default_rng(5).standard_normal(shape, np.float32) / np.sqrt(shape[1])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return make_matrix(layout, lambda first, last: rows[first:last], pool)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("device", ["tpu", "hopper"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_packed_product_is_that_of_the_canonical_arrays(scheme, device, cut):
    weight, canonical = matrix(scheme, device, cut), matrix(scheme, None, "alone" if scheme != "w8a8" else cut)
    assert isinstance(weight, AcceleratorWeight)
    x, bias = jax.random.normal(jax.random.key(1), (3, 2, K)), jnp.linspace(-1, 1, N)
    out, expected = (np.asarray(jax.jit(linear)(x, one, bias)) for one in (weight, canonical))
    # Where rows are cut, each shard's part of the activations has a scale of its own when it is quantized.
    bound = 1e-2 if cut == "rows" and scheme in ("w8a8", "llm.int8") else 1e-5
    assert np.linalg.norm(out - expected) <= bound * np.linalg.norm(expected)


@pytest.mark.parametrize("cut", ["alone", "columns"])
@pytest.mark.parametrize("device", ["tpu", "hopper"])
@pytest.mark.parametrize("scheme", ["int8", "int4", "q4_k"])
def test_a_packed_table_gives_its_rows(scheme, device, cut):
    tokens = jnp.array([[0, 5, N - 1], [N + 7, 100, 3]])
    rows = [np.asarray(jax.jit(lookup, static_argnums=2)(tokens, one, jnp.float32))
            for one in (matrix(scheme, device, cut), matrix(scheme, None, "alone"))]
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-6, atol=1e-7)


def test_what_a_device_has_no_kernel_for_stays_canonical():
    assert isinstance(matrix("int8", "older", "alone"), XlaWeight)
    assert isinstance(matrix("int4", "older", "alone"), AcceleratorWeight)  # through Triton
    assert isinstance(matrix("int8", "tpu", "alone", name="embed"), XlaWeight)
    assert isinstance(matrix("int8", "hopper", "alone", name="embed"), AcceleratorWeight)


def test_without_triton_in_jax_no_gpu_but_hopper_has_packed_weights(monkeypatch):
    hidden_triton.install(monkeypatch)
    assert isinstance(matrix("int4", "older", "alone"), XlaWeight)
    assert isinstance(matrix("int4", "hopper", "alone"), AcceleratorWeight)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("device", "scheme"), [("tpu", "int8"), ("hopper", "int4")])
def test_a_model_of_packed_weights_gives_the_logits_of_the_canonical_ones(device, scheme, tp):
    config = fit_to_mesh(find_shape("tiny"), make_mesh({"tp": tp}), DATA_TENSOR)
    tokens, positions, logits = np.arange(16, dtype=np.int32)[None], np.arange(16, dtype=np.int32)[None], []
    for device_or_none in (DEVICES[device], None):
        storage = Storage(np.dtype(np.float32), parse_policy(scheme), device=device_or_none)
        params, shapes = random_params(config, storage), abstract_params(config, np.float32, storage)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes)
        assert isinstance(params.layers[0].mlp.down, AcceleratorWeight if device_or_none else XlaWeight)
        logits.append(np.asarray(step(params, tokens, positions, init_cache(config, 1, 32), config)[0])[..., :config.vocab_size])
    assert np.abs(logits[0] - logits[1]).max() <= 1e-4 * logits[1].std()
