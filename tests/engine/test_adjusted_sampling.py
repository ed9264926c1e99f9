"""What a request may ask of its logits, through the whole engine."""
import collections
import dataclasses

import jax
import numpy as np
import pytest

from tests.engine.conftest import CONFIG, make_llm, random_prompts
from tpllm import LLM, SamplingParams, forward
from tpllm.errors import SamplingError

GREEDY = SamplingParams(temperature=0, max_tokens=24)


def tokens_of(llm, prompt, params):
    return llm.generate(prompt, params)[0].outputs[0].token_ids


def naive(llm, prompt: list[int], num_steps: int, *, repetition=1.0, frequency=0.0, presence=0.0) -> list[int]:
    """Greedy decoding by whole forward passes, the penalties in numpy."""
    row = list(prompt)
    step = jax.jit(forward, static_argnums=4)
    for _ in range(num_steps):
        padded = np.array([row + [0] * (80 - len(row))], np.int32)
        positions = np.where(np.arange(80) < len(row), np.arange(80), -1).astype(np.int32)[None]
        logits = np.asarray(step(llm.params, padded, positions, None, llm.config)[0])[0, len(row) - 1].astype(np.float64)
        counts = collections.Counter(row[len(prompt):])
        for token in set(row):
            logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
        for token, count in counts.items():
            logits[token] -= frequency * count + presence
        row.append(int(logits.argmax()))
    return row[len(prompt):]


@pytest.mark.parametrize("penalties", [{"repetition": 1.8}, {"frequency": 1.1}, {"presence": 1.9},
                                       {"repetition": 1.2, "frequency": 0.7, "presence": -0.6}], ids=str)
def test_penalties_give_the_tokens_of_a_plain_loop(llm, penalties):
    prompt = random_prompts(40, seed=3)[0]
    params = dataclasses.replace(GREEDY, **{f"{name}_penalty": value for name, value in penalties.items()})
    drawn = tokens_of(llm, prompt, params)
    assert drawn == naive(llm, prompt["prompt_token_ids"], 24, **penalties)
    assert drawn != tokens_of(llm, prompt, GREEDY)


def test_a_bias_draws_or_shuns_a_token(llm):
    prompt = random_prompts(9)
    first = tokens_of(llm, prompt, GREEDY)[0]
    assert first not in tokens_of(llm, prompt, dataclasses.replace(GREEDY, logit_bias={first: -100}))
    assert set(tokens_of(llm, prompt, dataclasses.replace(GREEDY, logit_bias={"17": 100}))) == {17}


def test_only_allowed_tokens_are_drawn(llm):
    params = SamplingParams(seed=1, temperature=2.0, max_tokens=40, allowed_token_ids=[3, 50, 77])
    assert set(tokens_of(llm, random_prompts(9), params)) == {3, 50, 77}


def test_adjusted_rows_leave_their_neighbours_alone_and_are_the_same_alone_and_sharded(llm):
    prompts = random_prompts(5, 20, 33, 8, 50, 12, 7, seed=6)
    params = [dataclasses.replace(GREEDY, presence_penalty=1.5) if index % 2 else SamplingParams(seed=index, max_tokens=24) for index in range(7)]
    params[3] = SamplingParams(seed=3, max_tokens=24, repetition_penalty=1.5, logit_bias={4: 5.0}, frequency_penalty=0.5)
    together = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    assert [tokens_of(llm, prompt, one) for prompt, one in zip(prompts, params, strict=True)] == together
    sharded = make_llm({"dp": 2, "tp": 4})
    assert tokens_of(sharded, prompts[1], params[1]) == together[1]


def test_a_slot_forgets_the_row_before(llm):
    penalized = dataclasses.replace(GREEDY, presence_penalty=2.0)
    prompts = random_prompts(*[6] * 9, seed=8)
    alone = [tokens_of(llm, prompt, penalized) for prompt in prompts]
    assert [output.outputs[0].token_ids for output in llm.generate(prompts, penalized)] == alone


def contains(tokens: list[int], sequence: list[int]) -> bool:
    return any(tokens[at:at + len(sequence)] == sequence for at in range(len(tokens)))


def test_bad_words_do_not_appear():
    with LLM("demo", mesh="tp=1", max_num_seqs=4, max_model_len=256) as llm:
        prompt, encode = "class Stack:\n    def __init__(", llm.get_tokenizer().encode
        free = llm.generate(prompt, dataclasses.replace(GREEDY, max_tokens=40))[0].outputs[0]
        pairs = (free.token_ids[at:at + 2] for at in range(20))
        pair = next(pair for pair in pairs if (text := llm.get_tokenizer().decode(pair)).strip()
                    and encode(" " + text.lstrip(), add_special_tokens=False) == pair)
        words = ["self", llm.get_tokenizer().decode(pair)]
        banned = llm.generate(prompt, dataclasses.replace(GREEDY, max_tokens=40, bad_words=words))[0].outputs[0]
        for word in words:
            for text in (word.lstrip(), " " + word.lstrip()):
                assert not contains(banned.token_ids, encode(text, add_special_tokens=False))
        assert contains(free.token_ids, encode("self", add_special_tokens=False))
        assert contains(free.token_ids, pair)
        with pytest.raises(SamplingError, match="the most is 8"):
            llm.generate(prompt, dataclasses.replace(GREEDY, bad_words=["x y z " * 9]))
        with pytest.raises(SamplingError, match="sequences; the most is 32"):
            llm.generate(prompt, dataclasses.replace(GREEDY, bad_words=[f"w{index}" for index in range(40)]))


@pytest.mark.parametrize(("values", "words"), [
    ({"presence_penalty": 2.5}, "presence_penalty is 2.5"), ({"frequency_penalty": -3}, "frequency_penalty is -3"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0"), ({"logit_bias": [1]}, "mapping"), ({"logit_bias": {"x": 1}}, "'x'"),
    ({"logit_bias": {3: 101}}, "token 3 is 101"), ({"allowed_token_ids": []}, "at least one token id"), ({"allowed_token_ids": [-1]}, "-1"),
    ({"bad_words": "one"}, "list of texts"), ({"bad_words": [" "]}, "none of them empty"),
])
def test_an_adjustment_out_of_range_is_named(values, words):
    with pytest.raises(SamplingError, match=words):
        SamplingParams(**values)


@pytest.mark.parametrize(("values", "words"), [
    ({"logit_bias": {CONFIG.vocab_size: 1}}, "token id 96"), ({"allowed_token_ids": [3, 400]}, "token id 400"),
    ({"bad_words": ["x"]}, "no tokenizer"),
])
def test_an_adjustment_that_the_model_cannot_take_is_named(llm, values, words):
    with pytest.raises(SamplingError, match=words):
        llm.generate(random_prompts(3), dataclasses.replace(GREEDY, **values))
