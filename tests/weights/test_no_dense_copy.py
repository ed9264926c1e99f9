"""The compiled step reads quantized weights as they are: it holds no dense copy of one."""
import concurrent.futures
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.conftest import lowered_decode
from tests.weights.test_quantize import KEPT, layout_of, random_rows
from tpllm import LLM
from tpllm.checkpoint.placement import make_matrix
from tpllm.weights.linear import linears, lookup
from tpllm.weights.quantize import SCHEMES

SHAPE = (96, 512)


@pytest.mark.parametrize("scheme", [*KEPT.values(), *SCHEMES.values()], ids=[*KEPT, *SCHEMES])
def test_a_product_and_a_lookup_make_no_array_of_the_weights_shape(native_library, scheme):
    layout, rows = layout_of(scheme, SHAPE, is_packed=True), random_rows(scheme, *SHAPE)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        weight = make_matrix(layout, lambda first, last: rows.take(slice(first, last)), pool)

    def step(x, tokens, weight):
        return linears(x, (weight, weight), (None, None)), lookup(tokens, weight, x.dtype)
    for dtype in ("float32", "bfloat16"):
        compiled = jax.jit(step).lower(jnp.ones((2, SHAPE[1]), dtype), jnp.zeros(3, jnp.int32), weight).compile()
        shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"(?:f32|bf16|f16|s8|u8)\[([\d,]+)\]", compiled.as_text())}
        assert not {shape for shape in shapes if int(np.prod(shape)) >= np.prod(SHAPE) and shape not in map(np.shape, jax.tree.leaves(weight))}
        assert compiled.memory_analysis().temp_size_in_bytes < np.prod(SHAPE)


@pytest.mark.parametrize("quantization", ["int8", "int4", "q4_k", "fp8", "w8a8", "llm.int8"])
def test_the_engines_decode_takes_no_memory_for_weights(native_library, quantization):
    with LLM("demo", mesh="tp=1", quantization=quantization, max_model_len=128, max_num_seqs=2) as llm:
        largest = max(leaf.nbytes for leaf in jax.tree.leaves(llm.params))
        assert lowered_decode(llm).compile().memory_analysis().temp_size_in_bytes < largest
