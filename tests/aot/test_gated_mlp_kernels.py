"""The gated product's kernels as the compilers of GPUs and TPUs make them, at shapes of production."""
import dataclasses

import jax
import pytest

from pallas_kernels.gated_mlp import gated_product
from pallas_kernels.gated_mlp.cases import SHAPES, Case
from pallas_kernels.quant_matmul.cases import packed_shapes
from pallas_kernels.quant_matmul.packing import WeightFormat, layout_for
from tests.aot.kernels import H200, TPUS, compile_kernel, device, implementation_for

pytestmark = pytest.mark.aot
SHARDED = (Case(16, 8192, 3584), Case(500, 8192, 1792), Case(3, 8192, 3584, weight_format=WeightFormat(bits=4, group=128, zero=8)))
"""Of a shard, with rows that fill no tile."""


@pytest.mark.parametrize("case", [*SHAPES, *SHARDED], ids=str)
@pytest.mark.parametrize("accelerator", [H200, TPUS[0], TPUS[2]])
def test_a_kernel_compiles_without_a_copy_of_a_weight_or_room_for_both_products(accelerator, case):
    check(accelerator, case)


@pytest.mark.parametrize("case", [SHAPES[1], SHAPES[3]], ids=str)
def test_also_for_a_chip_with_half_the_vector_memory(case):
    check(TPUS[1], case)


def check(accelerator, case):
    target, f = device(accelerator), case.weight_format
    layout = None if f is None else layout_for(target)
    f = None if f is None else dataclasses.replace(f, layout=layout)
    weight = jax.ShapeDtypeStruct((case.F, case.D), case.dtype) if f is None else packed_shapes(f, case.F, case.D)

    def run(x, gate, up):
        return gated_product(x, gate, up, activation=case.activation, device=target, weight_format=f, implementation=implementation_for(accelerator))
    program = compile_kernel(accelerator, run, jax.ShapeDtypeStruct((case.M, case.D), case.dtype), weight, weight)
    # Activations and the result may be padded to whole tiles.
    assert program.temporary_bytes <= 2 * max(case.M + 128, 512) * (case.D + case.F)
    weight_bytes = min(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight) if leaf.ndim == 2 and leaf.shape[0] > 1)
    assert [found.op for found in program.materialized if found.op in ("copy", "transpose") and found.largest.num_bytes >= weight_bytes] == []
