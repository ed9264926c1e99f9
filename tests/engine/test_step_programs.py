"""What XLA makes of the whole decode step."""
import collections
import math
import re

import jax
import numpy as np
import pytest

from tests.engine.conftest import CONFIG, make_llm, random_prompts
from tpllm import SamplingParams

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def compiled_decode(llm) -> str:
    runner = llm._engine.runner
    busy = np.ones(llm.shapes.max_num_seqs, bool)
    return runner._decode.lower(runner.params, runner.cache, runner.state, busy, np.int32(1), num_rows=llm.shapes.max_num_seqs).compile().as_text()


def collectives(text: str) -> dict[str, list[int]]:
    """The bytes of every collective's result, by kind."""
    found = collections.defaultdict(list)
    for shapes, kind in re.findall(rf"= (\(?\w+\[.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", text):
        sizes = [math.prod(map(int, dims.split(","))) if dims else 1 for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]
        found[kind].append(4 * sum(sizes))
    return found


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_sampling_adds_a_fixed_number_of_small_collectives_and_gathers_nothing(tp):
    llm = make_llm({"tp": tp})
    found = collectives(compiled_decode(llm))
    rows = llm.shapes.max_num_seqs
    hidden_bytes = 4 * rows * CONFIG.hidden_size
    backbone = [size for size in found["all-reduce"] if size == hidden_bytes]
    small = [size for size in found["all-reduce"] if size != hidden_bytes]
    assert len(backbone) == 2 * CONFIG.num_layers + 1
    assert len(small) <= 12
    assert max(small) <= 64 * rows * tp
    assert set(found) == {"all-reduce"}


def test_cache_and_slots_are_updated_in_place():
    llm = make_llm({"tp": 4})
    llm.generate(random_prompts(5), SamplingParams(max_tokens=2))
    runner = llm._engine.runner

    def pointers():
        return [shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(runner.cache) for shard in leaf.addressable_shards]
    before = pointers()
    llm.generate(random_prompts(40, 9, 20), SamplingParams(max_tokens=12))
    assert pointers() == before
