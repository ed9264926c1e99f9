"""What is held of every compiled step, whatever its accelerator; a subclass names the cases."""
import math

import jax

from tests.aot.compiled_steps import DTYPE, SHAPES, Case, compiled
from tpllm.aot.hlo import HloArray
from tpllm.aot.step_programs import abstract_cache, abstract_slots
from tpllm.model.params import abstract_params

MAX_SAMPLING_REDUCTIONS = 16  # best token and its id, finite or not, normalizer, chosen, rank; likeliest ones; top-k's, top-p's and min-p's sums


def shard_bytes(leaf) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def dims(shape) -> tuple[int, ...]:
    """Sizes in any order, without those of 1: a transposed or reshaped copy has the same."""
    return tuple(sorted(size for size in shape if size > 1))


def reduced_arrays(case: Case) -> list[HloArray]:
    """Every array that an all-reduce sums; a compiler may join several into one."""
    return [array for found in compiled(case).collectives for array in found.results]


def is_hidden(array: HloArray, case: Case) -> bool:
    return array.num_elements == case.num_tokens * case.config.hidden_size


def logits_bytes(case: Case) -> int:
    """Of one float32 array of [rows, vocabulary of a shard]."""
    return 4 * case.num_sampled_rows * case.config.padded_vocab_size // case.tp


class StepTests:
    """Checks of one case each."""

    def ceiling(self, case: Case) -> int:
        """Most bytes of temporaries, from shapes."""
        raise NotImplementedError

    def test_the_only_collectives_are_all_reduces_two_a_layer_one_for_the_embedding_and_small_ones_of_sampling(self, case):
        assert {found.op for found in compiled(case).collectives} == {"all-reduce"}
        arrays = reduced_arrays(case)
        assert sum(is_hidden(array, case) for array in arrays) == 2 * case.config.num_layers + 1
        sampling = [array for array in arrays if not is_hidden(array, case)]
        assert 0 < len(sampling) <= MAX_SAMPLING_REDUCTIONS
        # 4 bits a round of the threshold search: 15 sums a row. A TPU reduces a lone flag as a whole register of 128 lanes.
        assert max(array.num_elements for array in sampling) <= max(15 * case.num_sampled_rows, 128)

    def test_hidden_states_are_summed_in_the_dtype_of_the_activations(self, case):
        assert {array.dtype for array in reduced_arrays(case) if is_hidden(array, case)} == {"bf16"}

    def test_the_cache_and_the_slots_stay_where_they_are(self, case):
        config = case.config
        donated = jax.tree.leaves((abstract_cache(config, SHAPES, DTYPE), abstract_slots(config, SHAPES, num_stop_ids=65)))
        program = compiled(case)
        assert program.num_aliased == len(donated)
        assert program.memory.aliased_bytes >= sum(map(shard_bytes, donated))

    def test_no_copy_of_a_weight_is_made_and_each_cache_is_written_once_and_in_place(self, case):
        config = case.config
        written = [array for found in compiled(case).materialized for array in found.results if not array.is_on_chip]
        weights = {dims(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(abstract_params(config, DTYPE)) if leaf.ndim == 2}
        assert [array for array in written if dims(array.shape) in weights] == []
        cache = abstract_cache(config, SHAPES, DTYPE).keys[0]
        cache_elements = shard_bytes(cache) // cache.dtype.itemsize
        assert [array.dtype for array in written if array.num_elements >= cache_elements] == ["bf16"] * (2 * config.num_layers)

    def test_temporaries_stay_under_what_activations_need(self, case):
        assert compiled(case).temporary_bytes <= self.ceiling(case)
