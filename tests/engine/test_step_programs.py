"""What XLA makes of the whole decode step."""
import jax
import pytest

from tests.engine.conftest import CONFIG, lowered_decode, make_llm, random_prompts
from tpllm import SamplingParams
from tpllm.aot.report import CompiledProgram, compile_lowered


def compiled_decode(llm) -> CompiledProgram:
    return compile_lowered(lowered_decode(llm))


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_sampling_adds_a_fixed_number_of_small_collectives_and_gathers_nothing(tp):
    llm = make_llm({"tp": tp})
    found = compiled_decode(llm).collectives
    rows = llm.shapes.max_num_seqs
    sizes = [sum(array.num_bytes for array in instruction.results) for instruction in found]
    hidden_bytes = 4 * rows * CONFIG.hidden_size
    small = [size for size in sizes if size != hidden_bytes]
    assert len(sizes) - len(small) == 2 * CONFIG.num_layers + 1
    assert len(small) <= 12
    assert max(small) <= 64 * rows * tp
    assert {instruction.op for instruction in found} == {"all-reduce"}


def test_cache_and_slots_are_updated_in_place():
    llm = make_llm({"tp": 4})
    llm.generate(random_prompts(5), SamplingParams(max_tokens=2))
    executor = llm._engine.runner.executor

    def pointers():
        return [shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves((executor.cache, executor.state)) for shard in leaf.addressable_shards]
    before = pointers()
    llm.generate(random_prompts(40, 9, 20), SamplingParams(max_tokens=12))
    assert pointers() == before


def test_the_second_engine_of_a_process_compiles_nothing_unless_it_is_told_to_compute_otherwise(monkeypatch):
    prompts, params = random_prompts(3, 40), SamplingParams(seed=1, max_tokens=4)
    first = make_llm()
    expected = first.generate(prompts, params)
    second = make_llm()
    assert [output.outputs for output in second.generate(prompts, params)] == [output.outputs for output in expected]
    assert second._engine.runner.guard.num_compiles == 0
    monkeypatch.setenv("TPLLM_KERNELS", "0")
    third = make_llm()
    third.generate(prompts, params)
    assert third._engine.runner.guard.num_compiles > 0
