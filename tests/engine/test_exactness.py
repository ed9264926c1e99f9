"""Whatever the engine does with a row's pages, its tokens and log probabilities are the same to the last bit."""
import dataclasses
import functools

import pytest

from sharding_rules import ONE_DEVICE
from tests.engine.conftest import CONFIG, SHAPES, make_llm, make_packed_llm, random_prompts
from tests.engine.test_invariance import PARAMS, PROMPTS, exact
from tests.support.naive import greedy
from tpllm import SamplingParams, ops

IS_NATIVE = ops.uses_native(ONE_DEVICE)
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


@functools.cache
def alone(make, mesh: tuple, dtype: str) -> list[tuple]:
    """Each row by itself: a cache that holds one row is enough, and of the size of the tight ones its programs serve those too."""
    llm = make(dict(mesh), kv_cache_dtype=dtype, kv_cache_tokens=128 * dict(mesh).get("dp", 1))
    return [exact(llm.generate(prompt, params))[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


@pytest.fixture(params=["native", "xla"])
def make(request, monkeypatch):
    """Makes an engine: over packed weights and native kernels, or what XLA makes of the references."""
    if request.param == "native" and not IS_NATIVE:
        pytest.skip("the native library is not built here")
    if request.param == "xla":
        monkeypatch.setattr(ops, "uses_native", lambda _: False)
    return make_packed_llm if request.param == "native" else make_llm


@pytest.mark.parametrize(("mesh", "dtype"), [
    ({"tp": 1}, "float32"), ({"tp": 1}, "int8"), SLOW({"tp": 1}, "bfloat16"), SLOW({"tp": 2}, "fp8"), SLOW({"tp": 4}, "float32"),
    SLOW({"dp": 2, "tp": 2}, "int8"), SLOW({"dp": 2, "tp": 2}, "bfloat16")], ids=str)
def test_rows_that_lose_their_pages_again_and_again_are_bit_equal(make, mesh, dtype):
    tight = make(mesh, kv_cache_dtype=dtype, kv_cache_tokens=128 * mesh.get("dp", 1))
    expected = alone(make, tuple(mesh.items()), dtype)
    for order in (list(range(7)), list(range(6, -1, -1)), [0, 3, 5, 1, 2, 6, 4]):
        found = exact(tight.generate([PROMPTS[i] for i in order], [PARAMS[i] for i in order]))
        assert [found[order.index(i)] for i in range(7)] == expected
    assert tight._engine.scheduler.num_preemptions > 0
    assert all(pool.num_held == 0 for pool in tight._engine.scheduler.pools)


@pytest.mark.skipif(not IS_NATIVE, reason="without native kernels rows are always swapped")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_rows_that_are_swapped_to_the_host_and_back_are_bit_equal_too(dtype):
    tight = make_packed_llm(kv_cache_dtype=dtype, kv_cache_tokens=128, preemption="swap")
    assert exact(tight.generate(PROMPTS, PARAMS)) == alone(make_packed_llm, (("tp", 1),), dtype)
    assert tight._engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize(("make", "page_size", "chunk"), [("native", 32, 64), ("native", 128, 16), ("xla", 64, SHAPES["prefill_chunk_size"])],
                         indirect=["make"])  # without native kernels the size of a chunk decides about the last bits
def test_rows_are_bit_equal_at_every_page_size_and_however_their_prompts_are_cut(make, page_size, chunk):
    llm = make(page_size=page_size, prefill_chunk_size=chunk)
    assert exact(llm.generate(PROMPTS, PARAMS)) == alone(make, (("tp", 1),), "float32")


def shared_prompts(count: int) -> list[dict[str, list[int]]]:
    """Prompts that begin alike."""
    [head], tails = random_prompts(70, seed=3), random_prompts(*range(1, count + 1), seed=8)
    return [{"prompt_token_ids": head["prompt_token_ids"] + tail["prompt_token_ids"]} for tail in tails]


@pytest.mark.parametrize(("mesh", "dtype"), [({"tp": 1}, "float32"), ({"tp": 1}, "int8"), SLOW({"tp": 2}, "int8"),
                                             SLOW({"dp": 2, "tp": 2}, "float32")], ids=str)
def test_rows_whose_beginning_is_shared_are_bit_equal_to_those_that_compute_it(make, mesh, dtype):
    prompts, params = shared_prompts(12), [SamplingParams(seed=index, max_tokens=10, logprobs=1) for index in range(12)]
    options = {"kv_cache_dtype": dtype, "kv_cache_tokens": 128 if dtype == "int8" else None}  # the programs of the tight caches above
    plain, sharing = (make(mesh, enable_prefix_caching=is_on, **options) for is_on in (False, True))
    expected = exact(plain.generate(prompts, params))
    outputs = sharing.generate(prompts, params)
    assert exact(outputs) == expected
    assert sum(output.num_cached_tokens >= 64 for output in outputs) >= 10
    assert all(output.num_cached_tokens == 0 for output in plain.generate(prompts[:2], params[:2]))
    again = sharing.generate(prompts, params)
    assert exact(again) == expected
    assert min(output.num_cached_tokens for output in again) >= 64
    sharing.reset_prefix_cache()
    assert sharing.generate(prompts[0], params[0])[0].num_cached_tokens == 0


def test_a_conversation_that_goes_on_reuses_its_own_answers_where_that_changes_no_bit(make):
    llm, params = make(), SamplingParams(temperature=0, max_tokens=30, logprobs=0)
    first = llm.generate(random_prompts(20), params)[0]
    following = {"prompt_token_ids": [*first.prompt_token_ids, *first.outputs[0].token_ids, 5, 6, 7]}
    second = llm.generate([following], params)[0]
    assert second.num_cached_tokens == (48 if make is make_packed_llm else 16)  # or the first chunk of the prompt, and nothing of the answer
    fresh = make(enable_prefix_caching=False)
    assert exact([second]) == exact(fresh.generate([following], params))


@pytest.mark.parametrize("tokens", [None, 128])
@pytest.mark.parametrize("mesh", [{"tp": 1}, SLOW({"dp": 2, "tp": 2})], ids=str)
def test_the_samples_of_one_prompt_are_what_each_is_without_sharing_it(make, mesh, tokens):
    options = {} if tokens is None else {"kv_cache_tokens": tokens * mesh.get("dp", 1)}
    llm = make(mesh, **options)
    params = SamplingParams(n=6, seed=5, max_tokens=25, logprobs=0)
    plain = make(mesh, enable_prefix_caching=False)
    for prompt in random_prompts(1, 16, 45, 48, 49):
        samples = llm.generate([prompt], params)[0].outputs
        expected = plain.generate([prompt], params)[0].outputs
        assert [(sample.token_ids, sample.cumulative_logprob.hex()) for sample in samples] == [
            (sample.token_ids, sample.cumulative_logprob.hex()) for sample in expected]
        assert len({tuple(sample.token_ids) for sample in samples}) == 6


def test_greedy_rows_of_a_tight_cache_equal_the_naive_loop(make):
    llm = make(kv_cache_tokens=128)
    prompts = random_prompts(3, 40, 17, 64, 5, 90, seed=6)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == greedy(llm.params, llm.config, prompt["prompt_token_ids"], num_steps=24)
    assert llm._engine.scheduler.num_preemptions > 0


def test_penalties_and_prompt_scores_survive_a_preemption(make):
    params = [SamplingParams(temperature=0, max_tokens=30, frequency_penalty=0.7, repetition_penalty=1.3, prompt_logprobs=1),
              SamplingParams(seed=3, max_tokens=30, presence_penalty=1.5, logit_bias={5: 2.0}),
              SamplingParams(seed=4, max_tokens=30, prompt_logprobs=2),
              SamplingParams(temperature=0, max_tokens=30, repetition_penalty=1.8)]
    prompts = random_prompts(30, 25, 28, 31, seed=2)
    roomy, tight = make(), make(kv_cache_tokens=128)
    expected = roomy.generate(prompts, params)
    for order in ([0, 1, 2, 3], [0, 1, 3, 2], [0, 2, 1, 3], [1, 2, 0, 3]):  # in each another row loses its pages
        before = tight._engine.scheduler.num_preemptions
        found = tight.generate([prompts[i] for i in order], [params[i] for i in order])
        assert exact(found) == [exact(expected)[i] for i in order]
        assert [output.prompt_logprobs for output in found] == [expected[i].prompt_logprobs for i in order]
        assert tight._engine.scheduler.num_preemptions > before
        tight.reset_prefix_cache()


def test_a_prompt_that_is_begun_twice_has_its_scores_once(make):
    llm, (long, urgent) = make(kv_cache_tokens=128), random_prompts(90, 70, seed=4)
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=1)
    expected, engine = llm.generate([long], params)[0], llm.engine
    llm.reset_prefix_cache()
    request = engine.add_request("long", engine.prepare(long, params, priority=1))
    while not request.output.prompt_logprobs[1:]:
        engine.step()
    assert request.sequences[0].is_prefilling
    engine.add_request("urgent", engine.prepare(urgent, SamplingParams(max_tokens=2)))
    while engine.has_work:
        engine.step()
    assert request.sequences[0].num_preemptions == 1
    assert request.output.prompt_logprobs == expected.prompt_logprobs
    assert exact([request.output]) == exact([expected])


@pytest.mark.parametrize("make", ["native" if IS_NATIVE else "xla"], indirect=True)
def test_ropes_that_depend_on_the_prompts_length_share_nothing_across_lengths(make):
    from tpllm.model.config import RopeConfig
    config = dataclasses.replace(CONFIG, rope=RopeConfig(kind="dynamic", theta=10000.0, factor=2.0, original_max_position=32), layer_ropes=())
    sharing, plain = (make(config=config, enable_prefix_caching=is_on) for is_on in (True, False))
    prompts, params = shared_prompts(6), SamplingParams(temperature=0, max_tokens=12)
    outputs = sharing.generate(prompts, params)
    assert exact(outputs) == exact(plain.generate(prompts, params))
    assert not any(output.num_cached_tokens for output in outputs)
    assert exact(sharing.generate(prompts, params)) == exact(outputs)


def test_many_rows_coming_and_going_give_the_bits_of_each_alone(make):
    rng_prompts = random_prompts(*[3, 50, 20, 9, 33, 70, 1, 12] * 3, seed=11)
    params = [SamplingParams(seed=index, max_tokens=1 + 7 * index % 30, top_k=index % 4, n=1 + (index % 5 == 0)) for index in range(24)]
    llm = make(kv_cache_tokens=128)
    together = llm.generate(rng_prompts, params)
    single = make()
    for prompt, one, output in list(zip(rng_prompts, params, together, strict=True))[::3]:
        expected = single.generate([prompt], one)[0]
        assert [sample.token_ids for sample in output.outputs] == [sample.token_ids for sample in expected.outputs]
