"""RMSNorm's kernels as the compilers of GPUs and TPUs make them, at shapes of production."""
import jax
import pytest

from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.rms_norm.cases import SHAPES, Case
from tests.aot.kernels import H200, TPUS, compile_kernel, device, implementation_for

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("case", [*SHAPES, Case((5,), 16384, "float32", has_residual=True, quantized="int8")], ids=str)
@pytest.mark.parametrize("accelerator", [H200, *TPUS])
def test_a_kernel_compiles_and_keeps_nothing_in_main_memory(accelerator, case):
    check(accelerator, implementation_for(accelerator), case)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("case", [case for case in SHAPES if case.quantized != "float8_e4m3fn"], ids=str)
def test_the_route_through_triton_compiles(case):
    check(H200, "triton", case)


def check(accelerator, implementation, case):
    rows, vector = (jax.ShapeDtypeStruct(shape, case.dtype) for shape in ((*case.rows, case.D), (case.D,)))

    def run(x, weight, residual):
        return rms_norm(x, weight, eps=1e-5, residual_D=residual, quantized=case.quantized, device=device(accelerator), implementation=implementation)
    program = compile_kernel(accelerator, run, rows, vector, rows if case.has_residual else None)
    assert program.temporary_bytes <= (1 << 16) + 512 * rows.size // case.D  # a TPU may hold each scale as 128 lanes
    row_bytes = rows.size * rows.dtype.itemsize
    assert [found.op for found in program.materialized if found.op in ("copy", "transpose") and found.largest.num_bytes >= row_bytes] == []
