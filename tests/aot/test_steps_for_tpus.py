"""What libtpu makes of the engine's steps of Mistral 7B at tp=4 on a v5e and of Llama 3.1 70B at tp=8 on a v6e, in bfloat16."""
import pytest

from tests.aot.compiled_steps import DTYPE, SHAPES, fitted, parameters
from tests.aot.step_tests import StepTests, logits_bytes
from tpllm.aot.report import compile_lowered
from tpllm.aot.step_programs import lower_decode
from tpllm.errors import MemoryNeedError
from tpllm.model.params import abstract_params

VECTOR_MEMORY = 128 * 2**20  # of a v5e and of a v6e
# Of 70B's decode step since attention is a kernel: temporaries grow by 1.68 MiB a layer, without kernels by 1.47. No instruction writes them to main
# memory, and no weight or cache is copied there.
UNEXPLAINED = 8 * 2**20


@pytest.mark.aot
@pytest.mark.parametrize("case", parameters(("mistral-7b", 4, "v5e:2x2"), ("llama-3.1-70b", 8, "v6e:2x4")))
class TestStepsForTpus(StepTests):
    def ceiling(self, case):
        """What is prefetched into vector memory counts as temporary, weights too; copies in main memory are seen as instructions that write there."""
        return VECTOR_MEMORY + 8 * logits_bytes(case) + UNEXPLAINED


@pytest.mark.aot
def test_seventy_billion_parameters_in_bfloat16_are_refused_for_chips_of_16_gib_and_both_figures_are_named():
    config = fitted("llama-3.1-70b", 8, "v5e:2x4")
    with pytest.raises(MemoryNeedError, match=r"needs 1[89]\.\d+GiB of each device, which has 15\.75GiB"):
        compile_lowered(lower_decode(config, SHAPES, params=abstract_params(config, DTYPE), cache_dtype=DTYPE))
