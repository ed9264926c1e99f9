"""What libtpu makes of the engine's steps of Mistral 7B at tp=4 on a v5e and of Llama 3.1 70B at tp=8 on a v6e, in bfloat16."""
import pytest

from tests.aot.compiled_steps import DTYPE, SHAPES, compiled, fitted, parameters
from tests.aot.step_tests import StepTests, dims, logits_bytes
from tpllm.aot.report import compile_lowered
from tpllm.aot.step_programs import abstract_cache, lower_decode
from tpllm.errors import MemoryNeedError
from tpllm.model.params import abstract_params

TUPLE_BYTES = 2 * 16 * 2**10  # libtpu keeps a table of addresses for each tuple, in 16 KiB of its own, and counts those twice


@pytest.mark.aot
@pytest.mark.parametrize("case", parameters(("mistral-7b", 4, "v5e:2x2"), ("llama-3.1-70b", 8, "v6e:2x4")))
class TestStepsForTpus(StepTests):
    def ceiling(self, case):
        """Activations lie in vector memory, which does not count; logits may be in main memory."""
        tuples = sum(found.num_tuples for found in compiled(case).instructions if not found.is_fused)
        return 8 * logits_bytes(case) + tuples * TUPLE_BYTES

    def test_a_cache_that_would_fit_into_vector_memory_is_not_brought_there(self, case):
        keys = abstract_cache(case.config, SHAPES, DTYPE).keys[0]
        cache = keys.sharding.shard_shape(keys.shape)
        arrays = [array for found in compiled(case).instructions if not found.is_fused for array in found.results]
        assert sum(array.shape == cache for array in arrays) >= 2 * case.config.num_layers
        assert not any(array.is_on_chip for array in arrays if dims(array.shape) == dims(cache))


@pytest.mark.aot
def test_seventy_billion_parameters_in_bfloat16_are_refused_for_chips_of_16_gib_and_both_figures_are_named():
    config = fitted("llama-3.1-70b", 8, "v5e:2x4")
    with pytest.raises(MemoryNeedError, match=r"needs 1[89]\.\d+GiB of each device, which has 15\.75GiB"):
        compile_lowered(lower_decode(config, SHAPES, params=abstract_params(config, DTYPE), cache_dtype=DTYPE))
