"""Every field of ``SamplingParams`` does what it means, through ``LLM``; and each of these checks fails where its field is ignored."""
import dataclasses

import numpy as np
import pytest

from tests.engine.conftest import random_prompts
from tests.engine.plain_loop import all_logits, plain_tokens
from tpllm import LLM, SamplingParams
from tpllm.engine.outputs import RequestOutput

PROMPT = random_prompts(20, seed=2)[0]["prompt_token_ids"]
GREEDY = {"temperature": 0, "max_tokens": 24}
RANDOM = {"seed": 5, "max_tokens": 24}


@dataclasses.dataclass(frozen=True)
class Asker:
    """Asks for completions of one prompt.

    Attributes:
        llm: the engine.
        ignored: a field that is left at its default whatever is asked for, as if the engine did not know it.
    """

    llm: LLM
    ignored: str | None = None

    def ask(self, **values) -> RequestOutput:
        """The output of one request."""
        params = SamplingParams(**{name: value for name, value in values.items() if name != self.ignored})
        return self.llm.generate({"prompt_token_ids": PROMPT}, params)[0]

    def tokens(self, **values) -> list[int]:
        """The tokens of its first completion."""
        return self.ask(**values).outputs[0].token_ids

    def gives_the_plain_loops_tokens(self, *, index: int = 0, **values) -> bool:
        """Whether one completion equals what whole forward passes and the numpy sampler give; no field is ignored there."""
        expected = plain_tokens(self.llm, PROMPT, SamplingParams(**values), index=index, eos_ids=self.eos_ids)
        outputs = self.ask(**values).outputs
        return index < len(outputs) and outputs[index].token_ids == expected

    @property
    def eos_ids(self) -> list[int]:
        """The ids that end a text."""
        return sorted(self.llm.get_tokenizer().eos_token_ids)


def n(asker):
    outputs = asker.ask(n=3, **RANDOM).outputs
    assert [completion.index for completion in outputs] == [0, 1, 2]
    assert all(asker.gives_the_plain_loops_tokens(index=index, n=3, **RANDOM) for index in range(3))


def temperature(asker):
    assert asker.gives_the_plain_loops_tokens(temperature=0.5, **RANDOM)
    assert asker.gives_the_plain_loops_tokens(temperature=1.7, **RANDOM)
    first = int(all_logits(asker.llm, PROMPT)[-1].argmax())
    assert all(asker.tokens(temperature=0, seed=seed, max_tokens=1) == [first] for seed in range(5))


def top_p(asker):
    assert asker.gives_the_plain_loops_tokens(top_p=0.5, **RANDOM)


def top_k(asker):
    assert asker.gives_the_plain_loops_tokens(top_k=2, **RANDOM)


def min_p(asker):
    assert asker.gives_the_plain_loops_tokens(min_p=0.4, **RANDOM)


def presence_penalty(asker):
    assert asker.gives_the_plain_loops_tokens(presence_penalty=1.9, **GREEDY)
    assert asker.gives_the_plain_loops_tokens(presence_penalty=-2, **GREEDY)


def frequency_penalty(asker):
    assert asker.gives_the_plain_loops_tokens(frequency_penalty=1.1, **GREEDY)
    assert asker.gives_the_plain_loops_tokens(frequency_penalty=-2, **GREEDY)


def repetition_penalty(asker):
    assert asker.gives_the_plain_loops_tokens(repetition_penalty=2.5, **GREEDY)
    assert asker.gives_the_plain_loops_tokens(repetition_penalty=0.5, **GREEDY)


def logit_bias(asker):
    first = int(all_logits(asker.llm, PROMPT)[-1].argmax())
    assert set(asker.tokens(logit_bias={17: 100}, **GREEDY)) == {17}
    assert first not in asker.tokens(logit_bias={first: -100}, **GREEDY)
    assert asker.gives_the_plain_loops_tokens(logit_bias={first: -1, 17: 1.5}, **RANDOM)


def allowed_token_ids(asker):
    allowed = [3, 50, 77, 200]
    assert set(asker.tokens(allowed_token_ids=allowed, **{**RANDOM, "max_tokens": 60})) <= set(allowed)
    assert asker.gives_the_plain_loops_tokens(allowed_token_ids=allowed, **RANDOM)


def bad_words(asker):
    """Words of one token and of two, taken from what is written freely."""
    tokenizer, free = asker.llm.get_tokenizer(), asker.tokens(**GREEDY)
    stretches = [free[at:at + length] for length in (1, 2) for at in range(len(free) - 1)]
    words = [text for ids in stretches if (text := tokenizer.decode(ids)).strip() and tokenizer.encode(text, add_special_tokens=False) == ids]
    assert {len(tokenizer.encode(word, add_special_tokens=False)) for word in words} == {1, 2}
    words = [words[0], words[-1]]
    sequences = [tokenizer.encode(text, add_special_tokens=False) for word in words for text in (word.lstrip(), " " + word.lstrip())]
    drawn = asker.tokens(bad_words=words, **GREEDY)
    assert drawn == plain_tokens(asker.llm, PROMPT, SamplingParams(**GREEDY), eos_ids=asker.eos_ids, bad_words=sequences)
    assert not any(drawn[at:at + len(ids)] == ids for ids in sequences for at in range(len(drawn)))


def seed(asker):
    assert asker.gives_the_plain_loops_tokens(seed=11, max_tokens=24)
    assert asker.gives_the_plain_loops_tokens(seed=2**63 + 11, max_tokens=24)


def stop(asker):
    text = asker.ask(**GREEDY).outputs[0].text
    ended = asker.ask(stop=["not there", text[7:10]], **GREEDY).outputs[0]
    assert ended.text == text[:text.index(text[7:10])]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", text[7:10])


def include_stop_str_in_output(asker):
    free = asker.ask(**GREEDY).outputs[0]
    end = free.text.index(free.text[7:10]) + 3
    assert asker.ask(stop=free.text[7:10], include_stop_str_in_output=True, **GREEDY).outputs[0].text == free.text[:end]
    ended = asker.ask(stop_token_ids=[free.token_ids[5]], include_stop_str_in_output=True, **GREEDY).outputs[0]
    assert ended.text == asker.llm.get_tokenizer().decode(ended.token_ids)


def stop_token_ids(asker):
    stop_id = asker.tokens(**GREEDY)[5]
    assert asker.gives_the_plain_loops_tokens(stop_token_ids=[stop_id], **GREEDY)
    ended = asker.ask(stop_token_ids=[stop_id], **GREEDY).outputs[0]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop_id)


def ignore_eos(asker):
    eos = asker.eos_ids[0]
    completion = asker.ask(ignore_eos=True, logit_bias={eos: 100}, **GREEDY).outputs[0]
    assert completion.token_ids == [eos] * 24
    assert completion.finish_reason == "length"


def max_tokens(asker):
    completion = asker.ask(max_tokens=7, temperature=0, ignore_eos=True).outputs[0]
    assert len(completion.token_ids) == 7
    assert completion.finish_reason == "length"


def min_tokens(asker):
    eos = asker.eos_ids[0]
    tokens = asker.tokens(min_tokens=4, logit_bias={eos: 100}, **GREEDY)
    assert tokens.index(eos) == len(tokens) - 1 == 4
    text = asker.ask(**GREEDY).outputs[0].text
    assert len(asker.tokens(min_tokens=4, stop=text[0], **GREEDY)) > 4


def logprobs(asker):
    output = asker.ask(logprobs=3, **RANDOM)
    tokens, reported = output.outputs[0].token_ids, output.outputs[0].logprobs
    assert_scores(reported, tokens, all_logits(asker.llm, [*PROMPT, *tokens])[len(PROMPT) - 1:-1], count=3)


def prompt_logprobs(asker):
    reported = asker.ask(prompt_logprobs=2, **RANDOM).prompt_logprobs
    assert reported is not None
    assert reported[0] is None
    assert_scores(reported[1:], PROMPT[1:], all_logits(asker.llm, PROMPT)[:-1], count=2)


def assert_scores(reported, tokens, logits_TV, *, count):
    """Each token's log probability, the ``count`` largest ones and their ranks, by numpy."""
    assert reported is not None
    logprobs_TV = logits_TV - np.log(np.exp(logits_TV.astype(np.float64)).sum(-1, keepdims=True))
    for entry, token, logprobs_V in zip(reported, tokens, logprobs_TV, strict=True):
        ids = {*np.argsort(-logprobs_V, kind="stable")[:count].tolist(), token}
        assert set(entry) == ids
        for id_ in ids:
            assert entry[id_].logprob == pytest.approx(logprobs_V[id_], abs=1e-4)
            assert entry[id_].rank == 1 + (logprobs_V > logprobs_V[id_]).sum()


def skip_special_tokens(asker):
    tokenizer = asker.llm.get_tokenizer()
    special = min(tokenizer.special_ids - tokenizer.eos_token_ids)
    output = asker.ask(skip_special_tokens=False, logit_bias={special: 100}, temperature=0, max_tokens=3).outputs[0]
    assert output.text == tokenizer.piece(special) * 3


def detokenize(asker):
    completion = asker.ask(detokenize=False, **GREEDY).outputs[0]
    assert completion.token_ids
    assert completion.text == ""


def truncate_prompt_tokens(asker):
    assert asker.ask(truncate_prompt_tokens=3, **GREEDY).prompt_token_ids == PROMPT[-3:]


CASES = {function.__name__: function for function in (
    n, temperature, top_p, top_k, min_p, presence_penalty, frequency_penalty, repetition_penalty, logit_bias, allowed_token_ids, bad_words, seed,
    stop, include_stop_str_in_output, stop_token_ids, ignore_eos, max_tokens, min_tokens, logprobs, prompt_logprobs, skip_special_tokens,
    detokenize, truncate_prompt_tokens)}


def test_every_field_has_a_case():
    assert set(CASES) == {field.name for field in dataclasses.fields(SamplingParams)} - {"output_kind"}, "that one is AsyncLLM's"


@pytest.mark.parametrize("field", CASES)
def test_the_field_does_what_it_means(text_llm, field):
    CASES[field](Asker(text_llm))


@pytest.mark.parametrize("field", CASES)
def test_the_case_fails_where_the_field_is_ignored(text_llm, field):
    with pytest.raises(AssertionError):
        CASES[field](Asker(text_llm, ignored=field))


def test_scores_and_further_completions_come_only_where_asked_for(text_llm):
    output = Asker(text_llm).ask(**GREEDY)
    assert output.prompt_logprobs is output.outputs[0].logprobs is None
    assert len(output.outputs) == 1
