"""What the GPU benchmark will launch, at the sizes it times: compiled for an H200 by its own compiler, with no device."""
import jax
import pytest

from benchmarks.gpu import jax_sides
from benchmarks.gpu.contests import CONTESTS
from benchmarks.gpu.jax_worker import SIDES
from tests.aot.kernels import H200, compile_kernel, device

pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
OF_LIBRARIES = ("flash_jax", "dense_xla", "packed_xla", "fp8_xla", "norm_xla", "mlp_xla", "flash_tokamax", "norm_tokamax", "mlp_tokamax")
"""Sides that XLA makes of cuBLAS, cuDNN and its own fusions, and those of a package that is not installed here."""
ENTRANTS = {f"{contest.name}, {entrant.label}": (entrant, contest.sizes)
            for contests in CONTESTS.values() for contest in contests(is_tiny=False) for entrant in contest.entrants
            if entrant.worker == "jax" and entrant.side not in OF_LIBRARIES and entrant.options.get("implementation") != "jax_triton"}


@pytest.mark.parametrize("name", ENTRANTS)
def test_a_side_compiles_at_the_sizes_that_are_timed(name, monkeypatch):
    monkeypatch.setattr(jax_sides, "device_of", lambda _: device(H200))
    entrant, sizes = ENTRANTS[name]
    side = SIDES[entrant.side](**sizes, **entrant.options)
    program = compile_kernel(H200, side.call, *jax.eval_shape(side.inputs, jax.random.key(0)))
    if entrant.is_ours:
        assert program.custom_calls, "the op's own kernel, and not its reference"
