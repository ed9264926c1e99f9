"""What a request may ask of its logits, through the whole engine."""
import dataclasses

import pytest

from tests.engine.conftest import CONFIG, make_llm, random_prompts
from tests.engine.plain_loop import plain_tokens
from tpllm import LLM, SamplingParams
from tpllm.engine.admission import find_bad_words
from tpllm.errors import SamplingError

GREEDY = SamplingParams(temperature=0, max_tokens=24)


def tokens_of(llm, prompt, params):
    return llm.generate(prompt, params)[0].outputs[0].token_ids


def test_penalties_together_give_the_tokens_of_a_plain_loop_after_a_prompt_of_two_chunks(llm):
    prompt = random_prompts(40, seed=3)[0]
    params = dataclasses.replace(GREEDY, repetition_penalty=1.2, frequency_penalty=0.7, presence_penalty=-0.6)
    drawn = tokens_of(llm, prompt, params)
    assert drawn == plain_tokens(llm, prompt["prompt_token_ids"], params)
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
    ({"bad_words": "one"}, "list of texts"), ({"bad_words": [" "]}, "none of them empty"), ({"bad_words": 3}, "list of texts"),
    ({"repetition_penalty": float("inf")}, "inf"), ({"ignore_eos": "no"}, "ignore_eos is 'no'"), ({"skip_special_tokens": None}, "True or False"),
    ({"top_p": 10**400}, "at most 1"),
])
def test_a_value_out_of_range_is_named(values, words):
    with pytest.raises(SamplingError, match=words):
        SamplingParams(**values)


@pytest.mark.parametrize(("values", "words"), [
    ({"logit_bias": {CONFIG.vocab_size: 1}}, "token id 96"), ({"allowed_token_ids": [3, 400]}, "token id 400"),
    ({"bad_words": ["x"]}, "no tokenizer"),
])
def test_an_adjustment_that_the_model_cannot_take_is_named(llm, values, words):
    with pytest.raises(SamplingError, match=words):
        llm.generate(random_prompts(3), dataclasses.replace(GREEDY, **values))


@pytest.mark.parametrize("values", [{"min_tokens": 2, "stop_token_ids": [7], "allowed_token_ids": [7]}, {"temperature": 1.0, "min_tokens": 1,
                                    "stop_token_ids": [7, 8], "allowed_token_ids": [8, 7]}], ids=str)
def test_a_row_with_no_token_left_to_draw_ends_with_an_error_and_its_neighbours_go_on(llm, values):
    prompts = random_prompts(5, 6, 7)
    blocked, *others = (output.outputs[0] for output in llm.generate(prompts, [dataclasses.replace(GREEDY, **values), GREEDY, GREEDY]))
    assert (blocked.token_ids, blocked.finish_reason) == ([], "error")
    assert "leave no token to draw" in blocked.error
    assert [len(completion.token_ids) for completion in others] == [24, 24]


def test_no_token_may_be_left_in_the_middle_of_a_row(text_llm):
    only = text_llm.get_tokenizer().encode("x", add_special_tokens=False)
    completion = text_llm.generate({"prompt_token_ids": [5]}, dataclasses.replace(GREEDY, allowed_token_ids=only, bad_words=["xxx"]))[0].outputs[0]
    assert completion.token_ids == only * 2
    assert completion.finish_reason == "error"
    assert completion.text == "xx"


def test_a_least_number_of_tokens_near_the_end_of_32_bits_fills_the_context(llm):
    params = SamplingParams(temperature=0, min_tokens=2**31 - 1, stop_token_ids=range(50))
    completion = llm.generate(random_prompts(100), params)[0].outputs[0]
    assert len(completion.token_ids) == llm.shapes.max_model_len - 100
    assert set(completion.token_ids).isdisjoint(range(50))


@pytest.mark.parametrize(("word", "words"), [("\ud800", "cannot be encoded"), ("x" * 60, "the most is 8")])
def test_a_bad_word_that_cannot_be_one_is_named(text_llm, word, words):
    with pytest.raises(SamplingError, match=words):
        text_llm.generate({"prompt_token_ids": [5]}, dataclasses.replace(GREEDY, bad_words=[word]))


def test_bad_words_need_tokens_of_the_model():
    class NothingButX:
        def encode(self, text, *, add_special_tokens, parse_special):
            return [7] * text.count("x")
    assert find_bad_words(["x", "xx"], NothingButX(), vocab_size=8) == [[7], [7, 7]]
    assert find_bad_words(["x"], NothingButX(), vocab_size=7) == []
    with pytest.raises(SamplingError, match="the bad word 'y' has no tokens"):
        find_bad_words(["x", "y"], NothingButX(), vocab_size=8)


def test_none_is_the_same_as_nothing_where_vllm_has_none_by_default():
    assert SamplingParams(logit_bias=None, bad_words=None, stop=None, stop_token_ids=None) == SamplingParams()


@pytest.mark.parametrize("params", [{"temperature": 0}, 3, "greedy"])
def test_other_objects_than_sampling_parameters_are_refused(llm, params):
    with pytest.raises(SamplingError, match=r"give SamplingParams\(\.\.\.\)"):
        llm.generate(random_prompts(3), [params])
    assert not llm._engine.has_work
