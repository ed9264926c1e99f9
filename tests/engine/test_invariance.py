"""A row's tokens are bit-identical alone, in any batch and in any order."""
import dataclasses

import pytest

from tests.engine.conftest import make_llm, random_prompts
from tpllm import SamplingParams

PROMPTS = random_prompts(3, 18, 40, 64, 90, 7, 33, seed=4)
PARAMS = [SamplingParams(temperature=0, max_tokens=30), SamplingParams(seed=1, max_tokens=25), SamplingParams(seed=2, top_k=5, max_tokens=20),
          SamplingParams(seed=3, top_p=0.7, max_tokens=30), SamplingParams(temperature=0, max_tokens=8, logprobs=4),
          SamplingParams(seed=5, temperature=1.7, max_tokens=40), SamplingParams(seed=6, min_p=0.1, max_tokens=3, prompt_logprobs=2)]


def exact(outputs) -> list[tuple]:
    """Tokens and the sum of their log probabilities, to the last bit."""
    return [(output.outputs[0].token_ids, output.outputs[0].cumulative_logprob.hex()) for output in outputs]


@pytest.mark.parametrize(("mesh", "dtype"), [
    ({"tp": 1}, "float32"), ({"tp": 2}, "float32"), pytest.param({"dp": 2, "tp": 2}, "float32", marks=pytest.mark.slow),
    pytest.param({"tp": 1}, "bfloat16", marks=pytest.mark.slow), pytest.param({"tp": 2}, "bfloat16", marks=pytest.mark.slow)], ids=str)
def test_rows_are_bit_identical_alone_in_a_batch_of_seven_and_in_another_order(mesh, dtype):
    llm = make_llm(mesh, kv_cache_dtype=dtype)
    together = exact(llm.generate(PROMPTS, PARAMS))
    alone = [exact(llm.generate(prompt, params))[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    assert alone == together
    assert exact(llm.generate(PROMPTS[::-1], PARAMS[::-1]))[::-1] == together
    assert exact(make_llm(mesh, kv_cache_dtype=dtype).generate(PROMPTS[3:] + PROMPTS[:3], PARAMS[3:] + PARAMS[:3])) == together[3:] + together[:3]


def test_rows_are_bit_identical_whatever_else_comes_and_goes(llm):
    alone = exact(llm.generate(PROMPTS[1:2], PARAMS[1:2]))
    crowd = random_prompts(*[5, 90, 17, 2] * 4, seed=9)
    crowd_params = [SamplingParams(seed=100 + index, max_tokens=1 + index % 7, top_k=index % 3) for index in range(16)]
    outputs = llm.generate([*crowd[:6], PROMPTS[1], *crowd[6:]], [*crowd_params[:6], PARAMS[1], *crowd_params[6:]])
    assert exact(outputs[6:7]) == alone


def test_without_batch_invariance_the_rows_computed_follow_the_busy_slots():
    llm = make_llm(batch_invariant=False)
    greedy = dataclasses.replace(PARAMS[0], max_tokens=6)
    assert [len(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, greedy)] == [6] * 7
    assert llm.shapes.row_buckets == (1, 2, 4)
