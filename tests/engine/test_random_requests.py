"""Random requests, thousands of them: nothing crashes, nothing compiles, and every limit that a request sets is kept."""
import collections
import dataclasses
import math

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from tests.engine.conftest import CONFIG, make_llm
from tpllm import LLM, SamplingParams
from tpllm.engine.outputs import CompletionOutput, RequestOutput
from tpllm.errors import PromptError, SamplingError

CONTEXT, BATCH = 48, 20
TINY = dataclasses.replace(CONFIG, hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=32, max_position=CONTEXT)
GOOD = ({"prompt_token_ids": [70, 71, 72]}, SamplingParams(temperature=0, max_tokens=6))
MANY = settings(deadline=None, derandomize=True, database=None, suppress_health_check=[
    HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example])  # a batch of requests is a large example by design


@pytest.fixture(scope="module")
def tiny_llm(text_llm) -> LLM:
    """A model of one layer, with a tokenizer, that raises on any further compile."""
    tokenizer = text_llm.get_tokenizer()
    llm = make_llm(config=dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size), tokenizer=tokenizer, max_num_seqs=16,
                   max_model_len=CONTEXT, prefill_chunk_size=16)
    llm.warm_up(has_prompt_logprobs=True)
    return llm


def numbers(low: float, high: float, *extremes: float):
    return st.one_of(st.floats(low, high), st.sampled_from([low, high, *extremes]))


def lists(elements, most: int, least: int = 0):
    return st.lists(elements, min_size=least, max_size=most)


def valid_values(vocab_size: int):
    """Sampling values, each left out about every other time."""
    token, text = st.integers(0, vocab_size - 1), st.text("aeht lo\n.é", min_size=1, max_size=3)
    return st.fixed_dictionaries({}, optional={
        "n": st.integers(1, 3), "temperature": numbers(0, 3, 1e-300, 1e-6, 1e300), "top_p": numbers(0.01, 1, 1e-300), "top_k": st.integers(-1, 400),
        "min_p": numbers(0, 1, 1e-300), "presence_penalty": numbers(-2, 2), "frequency_penalty": numbers(-2, 2),
        "repetition_penalty": numbers(0.1, 10, 1e-300, 1e300), "logit_bias": st.dictionaries(token, numbers(-100, 100), max_size=4),
        "allowed_token_ids": st.one_of(st.none(), lists(token, 6, 1)), "bad_words": lists(text.filter(str.strip), 3),
        "seed": st.integers(-2**63, 2**64 - 1), "stop": st.one_of(text, lists(text, 3)), "include_stop_str_in_output": st.booleans(),
        "stop_token_ids": lists(st.integers(0, vocab_size + 9), 60), "ignore_eos": st.booleans(), "max_tokens": st.integers(1, 12),
        "min_tokens": st.sampled_from([0, 1, 2, 5, 12, 100, 2**31 - 1]), "logprobs": st.integers(0, 20), "prompt_logprobs": st.integers(0, 20),
        "skip_special_tokens": st.booleans(), "truncate_prompt_tokens": st.sampled_from([-1, 1, 5, 100])})


def valid_params(values: dict) -> SamplingParams:
    """Parameters of drawn values; the most tokens are at least the fewest ones."""
    if "max_tokens" in values:
        values = {**values, "min_tokens": min(values.get("min_tokens", 0), values["max_tokens"])}
    return SamplingParams(**values)


def prompts(vocab_size: int):
    """Token ids of every length up to and over the context, and texts."""
    return st.one_of(lists(st.integers(0, vocab_size - 1), 20, 1).map(lambda ids: {"prompt_token_ids": ids}),
                     st.integers(1, CONTEXT + 3).map(lambda length: {"prompt_token_ids": [length] * length}), st.text(max_size=10))


def check_output(llm: LLM, prompt, params: SamplingParams, output: RequestOutput) -> str:
    """Everything an output must keep to; returns how the request ended."""
    if not output.prompt_token_ids:
        ids = llm.get_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt["prompt_token_ids"]
        error = output.outputs[0].error
        assert (prompt == "" and "empty" in error) or (len(ids) >= CONTEXT and f"context holds {CONTEXT}" in error)
        return "refused"
    assert output.finished
    assert [completion.index for completion in output.outputs] == list(range(params.n))
    check_scores(output.prompt_logprobs, output.prompt_token_ids, params.prompt_logprobs, is_prompt=True)
    for completion in output.outputs:
        check_tokens(llm, params, completion, room=CONTEXT - len(output.prompt_token_ids))
        check_text(llm, params, completion)
        check_scores(completion.logprobs, completion.token_ids, params.logprobs)
        assert math.isfinite(completion.cumulative_logprob)
        if completion.logprobs is not None:
            drawn = sum(entry[token].logprob for entry, token in zip(completion.logprobs, completion.token_ids, strict=True))
            assert completion.cumulative_logprob == pytest.approx(drawn)
        if params.temperature == 0:
            assert completion.token_ids == output.outputs[0].token_ids
    return output.outputs[0].finish_reason


def check_tokens(llm: LLM, params: SamplingParams, completion: CompletionOutput, *, room: int) -> None:
    """Their number, those that are allowed and banned, and what ended them."""
    tokens, most, tokenizer = completion.token_ids, min(room, params.max_tokens or room), llm.get_tokenizer()
    eos_ids = frozenset() if params.ignore_eos else tokenizer.eos_token_ids
    stop_ids = eos_ids | set(params.stop_token_ids)
    assert all(0 <= token < llm.config.vocab_size for token in tokens)
    assert len(tokens) <= most
    assert stop_ids.isdisjoint(tokens[:max(len(tokens) - 1, params.min_tokens)])
    assert params.allowed_token_ids is None or set(tokens) <= set(params.allowed_token_ids)
    for ids in bad_sequences(params, tokenizer):
        assert not any(tokens[at:at + len(ids)] == ids for at in range(len(tokens)))
    if completion.finish_reason == "error":
        assert "leave no token to draw" in completion.error
        assert params.allowed_token_ids is not None
        return
    assert completion.error is None
    assert len(tokens) >= min(max(params.min_tokens, 1), most)
    if completion.finish_reason == "length":
        assert len(tokens) == most
        assert tokens[-1] not in stop_ids
        assert completion.stop_reason is None
    else:
        assert completion.finish_reason == "stop"
        reasons = {str: params.stop, int: params.stop_token_ids, type(None): (None,)}
        assert completion.stop_reason in reasons[type(completion.stop_reason)]
        assert isinstance(completion.stop_reason, str) or tokens[-1] == completion.stop_reason or tokens[-1] in eos_ids


def check_text(llm: LLM, params: SamplingParams, completion: CompletionOutput) -> None:
    """It is what the tokens decode to, up to a stop string."""
    is_stop_id = completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str)
    shown = completion.token_ids[:-1] if is_stop_id and not params.include_stop_str_in_output else completion.token_ids
    decoded = llm.get_tokenizer().decode(shown, skip_special_tokens=params.skip_special_tokens)
    assert decoded.startswith(completion.text)
    assert completion.text == decoded or any(decoded[len(completion.text):].startswith(stop) or completion.text.endswith(stop)
                                             for stop in params.stop)
    if isinstance(completion.stop_reason, str) and params.include_stop_str_in_output:
        assert completion.text.endswith(completion.stop_reason)
    if not params.min_tokens:
        inside = completion.text[:-1] if params.include_stop_str_in_output else completion.text
        assert not any(stop in inside for stop in params.stop)


def check_scores(reported, tokens: list[int], count: int | None, *, is_prompt: bool = False) -> None:
    """One entry a token, of the token and the ``count`` likeliest ones; none for a prompt's first token."""
    if count is None:
        assert reported is None
        return
    if is_prompt:
        assert reported[0] is None
        reported, tokens = reported[1:], tokens[1:]
    for entry, token in zip(reported, tokens, strict=True):
        ranks = sorted(scored.rank for scored in entry.values())
        assert len(entry) == count + (entry[token].rank > count) or len(set(ranks)) < len(ranks)  # ties share a rank
        assert max(count, 1) <= len(entry) <= count + 1
        assert all(math.isfinite(scored.logprob) and scored.logprob <= 1e-5 and scored.rank >= 1 for scored in entry.values())


def bad_sequences(params: SamplingParams, tokenizer) -> list[list[int]]:
    """The token sequences that may not appear."""
    return [tokenizer.encode(text, add_special_tokens=False) for word in params.bad_words for text in (word.lstrip(), " " + word.lstrip())]


@pytest.mark.parametrize("num_requests", [100, pytest.param(2_500, marks=pytest.mark.slow)])
def test_random_requests_keep_every_limit(tiny_llm, num_requests):
    vocab_size, endings = tiny_llm.config.vocab_size, collections.Counter()
    expected = tiny_llm.generate(*GOOD)[0].outputs[0].token_ids

    @settings(MANY, max_examples=num_requests // BATCH)
    @given(lists(st.tuples(prompts(vocab_size), valid_values(vocab_size).map(valid_params)), BATCH, BATCH))
    def run(requests):
        outputs = {output.request_id: output for output in
                   tiny_llm.generate_iter(*zip(*requests, GOOD, strict=True), on_error="return")}
        assert sorted(outputs, key=int) == [str(index) for index in range(BATCH + 1)]
        for index, (prompt, params) in enumerate(requests):
            endings[check_output(tiny_llm, prompt, params, outputs[str(index)])] += 1
        assert outputs[str(BATCH)].outputs[0].token_ids == expected, "a row's tokens do not depend on its batch"
        assert not tiny_llm._engine.has_work
    run()
    assert endings.total() >= num_requests
    assert {"stop", "length", "refused"} <= set(endings)


ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-3, 400), st.sampled_from([10**400, -10**400]), st.floats(), st.text(max_size=5),
              st.binary(max_size=3)),
    lambda inner: st.one_of(lists(inner, 3), lists(inner, 3).map(tuple),
                            st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), inner, max_size=3)),
    max_leaves=5)
PLAUSIBLE = st.sampled_from([1, None, True, False, 0, 2, 0.5, 1.0, "a", "8", (), ["a", "b c"], [5], [5, 6], range(3), {}, {5: 1.0}, {"6": -2}])


@pytest.mark.parametrize("num_requests", [100, pytest.param(2_000, marks=pytest.mark.slow)])
def test_whatever_a_field_holds_it_works_or_is_refused_by_name_and_the_engine_goes_on(tiny_llm, num_requests):
    expected, outcomes = tiny_llm.generate(*GOOD)[0].outputs[0].token_ids, collections.Counter()
    names = [field.name for field in dataclasses.fields(SamplingParams)]

    @settings(MANY, max_examples=num_requests // 5)
    @given(*(lists(st.tuples(st.sampled_from(names), values), count, count) for values, count in ((ANYTHING, 2), (PLAUSIBLE, 3))))
    def run(any_fields, plausible_fields):  # so many of each that work are drawn
        for name, value in any_fields + plausible_fields:
            try:
                params = SamplingParams(**{"max_tokens": 3, **({"max_tokens": None} if name == "min_tokens" else {}), name: value})
                junk, good = tiny_llm.generate([{"prompt_token_ids": [9]}, GOOD[0]], [params, GOOD[1]])
            except SamplingError as error:
                message = str(error)
            else:
                check_output(tiny_llm, {"prompt_token_ids": [9]}, params, junk)
                assert good.outputs[0].token_ids == expected
                outcomes["accepted"] += 1
                continue
            assert name in message or (name == "bad_words" and "bad word" in message)
            outcomes["refused"] += 1
        assert tiny_llm.generate(*GOOD)[0].outputs[0].token_ids == expected
    run()
    assert min(outcomes["accepted"], outcomes["refused"]) > num_requests / 10


@pytest.mark.parametrize("num_prompts", [100, pytest.param(2_000, marks=pytest.mark.slow)])
def test_whatever_a_prompt_is_it_works_or_is_refused_and_the_engine_goes_on(tiny_llm, num_prompts):
    expected = tiny_llm.generate(*GOOD)[0].outputs[0].token_ids

    @settings(MANY, max_examples=num_prompts // 5)
    @given(lists(st.one_of(ANYTHING, ANYTHING.map(lambda ids: {"prompt_token_ids": ids}), ANYTHING.map(lambda text: {"prompt": text})), 5, 5))
    def run(drawn):
        for prompt in drawn:
            errors = (PromptError, *([SamplingError] if isinstance(prompt, tuple) and len(prompt) == 2 else []))  # a pair brings parameters
            try:
                output = tiny_llm.generate([prompt, GOOD[0]], GOOD[1])[0]
            except errors:
                continue
            check_output(tiny_llm, prompt, GOOD[1], output)
        assert tiny_llm.generate(*GOOD)[0].outputs[0].token_ids == expected
    run()
