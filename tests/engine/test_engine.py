"""The engine against the naive loop, and what a request may ask of it."""
import dataclasses

import jax
import numpy as np
import pytest

from tests.engine.conftest import CONFIG, make_llm, random_prompts
from tests.support.naive import greedy
from tpllm import SamplingParams
from tpllm.engine.slots import TARGET
from tpllm.errors import ConfigError, PromptError, SamplingError, TokenizerError, TpllmError

GREEDY = SamplingParams(temperature=0, max_tokens=12)
LENGTHS = (1, 5, 16, 31, 32, 33, 64, 70, 100)  # around the buckets 16 and 32


def tokens_of(outputs) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


@pytest.fixture(scope="module")
def naive_tokens(llm):
    """What the naive loop says after prompts of ``LENGTHS``, on one device."""
    return [greedy(llm.params, llm.config, prompt["prompt_token_ids"], num_steps=12) for prompt in random_prompts(*LENGTHS)]


@pytest.mark.parametrize(("mesh", "chunk"), [({"tp": 1}, 32), ({"tp": 4}, 16), ({"dp": 2, "tp": 2}, 32)], ids=str)
def test_greedy_tokens_equal_the_naive_loops_on_every_mesh(mesh, chunk, naive_tokens):
    outputs = make_llm(mesh, prefill_chunk_size=chunk).generate(random_prompts(*LENGTHS), GREEDY)
    assert tokens_of(outputs) == naive_tokens
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}


def test_outputs_come_in_the_order_of_their_prompts_and_hold_them(llm):
    prompts = random_prompts(40, 3, 9, 70, 2, 8)
    params = [dataclasses.replace(GREEDY, max_tokens=count) for count in (20, 1, 2, 3, 9, 4)]
    outputs = llm.generate(prompts, params)
    assert [output.prompt_token_ids for output in outputs] == [prompt["prompt_token_ids"] for prompt in prompts]
    assert [len(tokens) for tokens in tokens_of(outputs)] == [20, 1, 2, 3, 9, 4]
    assert all(output.finished and output.metrics.arrival_time <= output.metrics.first_token_time <= output.metrics.finished_time
               for output in outputs)


def test_generate_iter_gives_short_rows_before_long_ones_and_reads_prompts_lazily(llm):
    taken = []

    def prompts():
        for index, prompt in enumerate(random_prompts(*[4] * 60)):
            taken.append(index)
            yield prompt
    params = (dataclasses.replace(GREEDY, max_tokens=60 if index == 0 else 2) for index in range(60))
    order = []
    for output in llm.generate_iter(prompts(), params):
        order.append(int(output.request_id))
        assert len(taken) <= len(order) + 3 * llm.shapes.max_num_seqs
    assert sorted(order) == list(range(60))
    assert order[0] != 0


def test_closing_generate_iter_gives_up_what_is_running(llm):
    iterator = llm.generate_iter(random_prompts(*[4] * 20), GREEDY)
    next(iterator)
    iterator.close()
    assert not llm._engine.has_work
    assert tokens_of(llm.generate(random_prompts(5), GREEDY)) == tokens_of(make_llm().generate(random_prompts(5), GREEDY))


def test_n_samples_differ_and_each_is_what_its_index_alone_gives(llm):
    prompt, params = random_prompts(7), SamplingParams(n=6, seed=3, max_tokens=10, temperature=1.0)
    samples = llm.generate(prompt, params)[0].outputs
    assert [sample.index for sample in samples] == list(range(6))
    assert len({tuple(sample.token_ids) for sample in samples}) == 6
    fewer = llm.generate(prompt, dataclasses.replace(params, n=2))[0].outputs
    assert [sample.token_ids for sample in fewer] == [sample.token_ids for sample in samples[:2]]


def test_a_seed_repeats_and_no_seed_does_not(llm):
    prompt = random_prompts(7)
    seeded, free = SamplingParams(seed=11, max_tokens=12), SamplingParams(max_tokens=12)
    assert tokens_of(llm.generate(prompt, seeded)) == tokens_of(llm.generate(prompt, seeded))
    assert tokens_of(llm.generate(prompt, seeded)) != tokens_of(llm.generate(prompt, dataclasses.replace(seeded, seed=12)))
    assert tokens_of(llm.generate(prompt, free)) != tokens_of(llm.generate(prompt, free))
    assert tokens_of(make_llm(seed=5).generate(prompt, free)) == tokens_of(make_llm(seed=5).generate(prompt, free))


def test_a_stop_token_ends_the_row_and_is_named(llm):
    prompt = random_prompts(9)
    free = llm.generate(prompt, GREEDY)[0].outputs[0].token_ids
    stop = free[4]
    first = free.index(stop)
    completion = llm.generate(prompt, dataclasses.replace(GREEDY, stop_token_ids=[stop]))[0].outputs[0]
    assert completion.token_ids == free[:first + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_min_tokens_holds_stop_ids_back(llm):
    prompt = random_prompts(9)
    stop = llm.generate(prompt, GREEDY)[0].outputs[0].token_ids[0]
    params = dataclasses.replace(GREEDY, stop_token_ids=[stop], min_tokens=5)
    tokens = llm.generate(prompt, params)[0].outputs[0].token_ids
    assert len(tokens) >= 5
    assert stop not in tokens[:5]


def test_end_of_sequence_ids_stop_a_row_unless_ignored():
    llm, prompt = make_llm(), random_prompts(9)
    free = llm.generate(prompt, GREEDY)[0].outputs[0].token_ids
    llm._engine.runner.eos_ids = frozenset({free[3]})
    ended = llm.generate(prompt, GREEDY)[0].outputs[0]
    assert ended.token_ids == free[:free.index(free[3]) + 1]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
    assert llm.generate(prompt, dataclasses.replace(GREEDY, ignore_eos=True))[0].outputs[0].token_ids == free


def test_without_max_tokens_a_row_fills_the_context(llm):
    completion = llm.generate(random_prompts(100), SamplingParams(temperature=0))[0].outputs[0]
    assert len(completion.token_ids) == llm.shapes.max_model_len - 100
    assert completion.finish_reason == "length"
    beyond = llm.generate(random_prompts(100), SamplingParams(temperature=0, max_tokens=10_000))[0].outputs[0]
    assert beyond.token_ids == completion.token_ids


def test_log_probabilities_match_a_forward_pass_over_the_whole_row(llm):
    prompt = random_prompts(45)
    output = llm.generate(prompt, SamplingParams(temperature=0.9, seed=2, max_tokens=8, logprobs=3, prompt_logprobs=2))[0]
    completion = output.outputs[0]
    row = np.array([output.prompt_token_ids + completion.token_ids])
    logits, _ = jax.jit(_forward, static_argnums=2)(llm.params, row, llm.config)
    exact = np.asarray(jax.nn.log_softmax(logits[0]))
    reported = output.prompt_logprobs[1:] + completion.logprobs
    assert output.prompt_logprobs[0] is None
    assert len(reported) == row.shape[1] - 1
    for position, entry in enumerate(reported):
        token = row[0, position + 1]
        assert entry[token].logprob == pytest.approx(exact[position, token], abs=1e-4)
        assert entry[token].rank == 1 + int((exact[position] > exact[position, token] + 1e-7).sum())
        assert len(entry) - (entry[token].rank > len(entry) - 1) == (2 if position < 44 else 3)
    drawn = sum(entry[token].logprob for entry, token in zip(completion.logprobs, completion.token_ids, strict=True))
    assert completion.cumulative_logprob == pytest.approx(drawn, abs=1e-5)


def _forward(params, tokens_BT, config):
    from tpllm import forward
    return forward(params, tokens_BT, np.arange(tokens_BT.shape[1], dtype=np.int32)[None], None, config)


def test_a_row_with_nan_logits_fails_alone():
    llm = make_llm(config=dataclasses.replace(CONFIG, ties_embeddings=False))
    params = llm.params
    llm._engine.runner.executor.params[TARGET] = params.replace(embed=params.embed.at[7].set(np.nan))
    prompts = random_prompts(6, 6)
    prompts[0]["prompt_token_ids"] = [1, 2, 3]
    prompts[1]["prompt_token_ids"] = [1, 7, 3]
    fine, broken = (output.outputs[0] for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=3)))
    assert broken.finish_reason == "error"
    assert "not finite" in broken.error
    assert 7 not in fine.token_ids
    assert fine.finish_reason == "length"


def test_stream_gives_the_same_tokens_as_generate(llm):
    prompt, params = random_prompts(20)[0], SamplingParams(seed=4, n=2, max_tokens=15)
    streamed = {0: [], 1: []}
    ends = {}
    for delta in llm.stream(prompt, params):
        streamed[delta.index] += delta.token_ids
        if delta.finish_reason:
            ends[delta.index] = delta.finish_reason
    assert [streamed[0], streamed[1]] == tokens_of(llm.generate(prompt, params))
    assert ends == {0: "length", 1: "length"}


@pytest.mark.parametrize(("prompt", "words"), [
    ({"prompt_token_ids": []}, ["empty"]),
    ({"prompt_token_ids": [3] * 120}, ["120 tokens", "context holds 120", "119"]),
    ({"prompt_token_ids": [3, 96]}, ["96", "0 to 95"]),
    ({"prompt_token_ids": [3, "x"]}, ["'x'"]),
    ({"prompt_token_ids": [3, True]}, ["True", "whole numbers"]),
    ({"prompt_token_ids": 5}, ["5", "list of token ids"]),
    ({"prompt_token_ids": b"ab"}, ["b'ab'", "list of token ids"]),
    ({"prompt_token_ids": np.ones((2, 1), int)}, ["list of token ids"]),
    ({"nothing": 5}, ["no tokenizer"]),
    (7.5, ["7.5", "prompt_token_ids"]),
])
def test_a_bad_prompt_is_refused_with_its_value_and_the_limit(llm, prompt, words):
    error = TokenizerError if "no tokenizer" in words else PromptError
    with pytest.raises(error) as caught:
        llm.generate([prompt], GREEDY)
    assert all(word in str(caught.value) for word in words)
    failed = next(llm.generate_iter([prompt], GREEDY, on_error="return"))
    assert failed.outputs[0].finish_reason == "error"
    assert failed.outputs[0].error == str(caught.value)


def test_a_bad_prompt_among_good_ones_leaves_the_others(llm):
    prompts = [*random_prompts(4), {"prompt_token_ids": []}, *random_prompts(6)]
    outputs = {output.request_id: output for output in llm.generate_iter(prompts, GREEDY, on_error="return")}
    assert outputs["1"].outputs[0].finish_reason == "error"
    assert [len(outputs[key].outputs[0].token_ids) for key in ("0", "2")] == [12, 12]


def test_stop_strings_need_a_tokenizer(llm):
    with pytest.raises(SamplingError, match="no tokenizer"):
        llm.generate(random_prompts(3), dataclasses.replace(GREEDY, stop="x"))


def test_as_many_parameters_as_prompts_are_asked_for(llm):
    with pytest.raises(ConfigError, match="2 prompts but 1 sampling_params"):
        llm.generate(random_prompts(3, 4), [GREEDY])


@pytest.mark.parametrize(("options", "words"), [
    ({"max_num_seqs": 0}, "max_num_seqs is 0"), ({"max_model_len": 161}, "context is 160"), ({"prefill_chunk_size": 24}, "power of two"),
    ({"mesh": {"dp": 2, "tp": 2}, "max_num_seqs": 3}, "use 4"), ({"kv_cache_dtype": "int3"}, "int3"),
])
def test_impossible_sizes_are_refused(options, words):
    with pytest.raises(TpllmError, match=words):
        make_llm(options.pop("mesh", None), **options)


def test_after_warm_up_nothing_compiles(monkeypatch):
    monkeypatch.setenv("TPLLM_COMPILE_GUARD", "raise")
    llm = make_llm(prefill_chunk_size=32)
    llm.warm_up(has_prompt_logprobs=True)
    params = [SamplingParams(temperature=0, max_tokens=3), SamplingParams(top_k=3, max_tokens=9, logprobs=5, seed=1),
              SamplingParams(top_p=0.5, max_tokens=4, prompt_logprobs=1), SamplingParams(n=3, max_tokens=2),
              SamplingParams(min_tokens=3, max_tokens=5)]
    assert len(llm.generate(random_prompts(3, 20, 40, 90, 33), params)) == 5
    assert llm._engine.runner.guard.is_armed


def test_the_compile_guard_raises_on_a_compile_after_warm_up(monkeypatch):
    from tpllm.engine.executor import CompileGuard, UnexpectedCompileError

    monkeypatch.setenv("TPLLM_COMPILE_GUARD", "raise")
    guard = CompileGuard()
    guard.arm()
    with pytest.raises(UnexpectedCompileError), guard:
        jax.jit(lambda x: x * 3 + 41)(np.float32(np.pi))


def test_what_is_called_within_a_step_may_read_the_metrics(llm, monkeypatch):
    plan, seen = llm._engine.scheduler.plan, []

    def noted(*arguments):
        seen.append(llm.metrics().num_pages)
        return plan(*arguments)
    monkeypatch.setattr(llm._engine.scheduler, "plan", noted)
    llm.generate(random_prompts(5), GREEDY)
    assert set(seen) == {llm.metrics().num_pages}


def test_a_closed_llm_gives_its_memory_back_and_says_that_it_is_closed():
    before = len(jax.live_arrays())
    with make_llm() as llm:
        llm.generate(random_prompts(4), GREEDY)
        assert len(jax.live_arrays()) > before
    assert len(jax.live_arrays()) <= before
    with pytest.raises(ConfigError, match="closed"):
        llm.generate(random_prompts(4), GREEDY)
    llm.close()


def test_deleting_an_llm_frees_its_arrays():
    before = len(jax.live_arrays())
    llm = make_llm()
    llm.generate(random_prompts(4), GREEDY)
    assert len(jax.live_arrays()) > before
    del llm
    assert len(jax.live_arrays()) <= before
