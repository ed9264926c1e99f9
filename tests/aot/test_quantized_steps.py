"""Whole steps of quantized models: kernels read the weights, and no dense copy of one is made."""
import dataclasses
import functools
import math
import re

import numpy as np
import pytest

from sharding_rules import DATA_TENSOR
from tests.aot.compiled_steps import DTYPE
from tests.aot.step_tests import dims, shard_bytes
from tpllm import ops
from tpllm.aot.report import compile_lowered
from tpllm.aot.step_programs import abstract_cache, lower_decode
from tpllm.aot.topologies import accelerator_mesh
from tpllm.bench.shapes import find_shape
from tpllm.engine.shapes import EngineShapes
from tpllm.model.params import abstract_params
from tpllm.model.partition import fit_to_mesh
from tpllm.weights.accelerator import AcceleratorWeight
from tpllm.weights.policy import parse_policy
from tpllm.weights.storage import Storage

pytestmark = pytest.mark.aot
SHAPES = EngineShapes(max_num_seqs=16, max_model_len=4096, prefill_chunk=512)
NUM_LAYERS = 2
CALLS = {"h200:2": r"mosaic_gpu\w*", "v5e:2x2": "tpu_custom_call"}


@functools.cache
def compiled(accelerator, scheme):
    """(parameters, cache, program) of the decode step of the first layers of an 8B model."""
    config = dataclasses.replace(find_shape("llama-3.1-8b"), num_layers=NUM_LAYERS)
    mesh = accelerator_mesh(accelerator, {"tp": 4 if accelerator == "v5e:2x2" else 2})
    config = fit_to_mesh(config, mesh, DATA_TENSOR)
    params = abstract_params(config, DTYPE, Storage(np.dtype(DTYPE), parse_policy(scheme), device=ops.device_with_kernels(config.partition)))
    program = compile_lowered(lower_decode(config, SHAPES, params=params, cache_dtype=DTYPE))
    return params, abstract_cache(config, SHAPES, DTYPE), program


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("accelerator", CALLS)
class TestOneStep:
    """Of one accelerator and scheme."""

    def test_kernels_multiply_gate_and_attend(self, accelerator, scheme):
        params, _, program = compiled(accelerator, scheme)
        assert all(isinstance(getattr(params.layers[0].mlp, name), AcceleratorWeight) for name in ("gate", "up", "down"))
        calls = [target for target in program.custom_calls if re.fullmatch(CALLS[accelerator], target)]
        assert len(calls) >= NUM_LAYERS * 7 + 1  # q, k, v, attention, o, gate and up, down; and the head

    def test_no_weight_is_copied_or_made_dense(self, accelerator, scheme):
        params, cache, program = compiled(accelerator, scheme)
        matrices = (params.layers[0].mlp.gate, params.layers[0].attn.q, params.head)
        weights = {dims(matrix.codes.sharding.shard_shape(matrix.codes.shape)) for matrix in matrices}
        weights |= {dims(matrix.layout.shard_shape) for matrix in matrices}
        assert [found.largest for found in program.materialized if dims(found.largest.shape) in weights] == []
        assert program.temporary_bytes < 2 * math.prod(params.layers[0].mlp.gate.layout.shard_shape)  # one made dense
        assert program.num_aliased >= 2 * NUM_LAYERS
        written = [array for found in program.materialized for array in found.results if array.num_elements >= shard_bytes(cache.keys[0]) // 2]
        assert len(written) == 2 * NUM_LAYERS
