"""What XLA:GPU makes of the engine's steps of Mistral 7B at tp=4 and Llama 3.1 70B at tp=8 on H200s, in bfloat16."""
import jax
import pytest

from tests.aot.compiled_steps import DTYPE, SHAPES, compiled, parameters
from tests.aot.step_tests import StepTests, logits_bytes, shard_bytes
from tpllm.aot.step_programs import abstract_cache
from tpllm.model.params import abstract_params


@pytest.mark.aot
@pytest.mark.parametrize("case", parameters(("mistral-7b", 4, "h200:4"), ("llama-3.1-70b", 8, "h200:8")))
class TestStepsForGpus(StepTests):
    def ceiling(self, case):
        """Decode holds some arrays of logits while it samples, prefill some of hidden states."""
        return 8 * logits_bytes(case) if case.step == "decode" else 7 * 2 * case.num_tokens * case.config.hidden_size

    def test_the_ceiling_leaves_no_room_for_one_copied_weight_or_cache_or_for_gathered_logits(self, case):
        slack = self.ceiling(case) - compiled(case).temporary_bytes
        params, keys = abstract_params(case.config, DTYPE), shard_bytes(abstract_cache(case.config, SHAPES, DTYPE).keys[0])
        if case.step == "decode":
            assert slack < min(keys, case.tp * logits_bytes(case), *(shard_bytes(leaf) for leaf in jax.tree.leaves(params) if leaf.ndim == 2))
        else:  # smaller weights are no larger than hidden states: the test of what is written sees their copies
            assert slack < min(2 * keys, shard_bytes(params.layers[0].mlp.gate))
