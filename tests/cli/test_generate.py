"""`tpllm generate`: what it makes of the prompt, what it prints of the answer, and what it says beside it."""
import io
import json
import re
import sys
from types import SimpleNamespace

import pytest

from tests.jobs.fake_llm import FakeLLM
from tpllm import LLM, SamplingParams
from tpllm.cli.main import main
from tpllm.engine.outputs import CompletionDelta
from tpllm.errors import TpllmError

GREEDY = SamplingParams(temperature=0, max_tokens=8)
SPEED = r"tpllm: 8 tokens, the most that were allowed, \d+\.\d tokens/s, first token after \d+\.\d\d s\n"


class Listening(FakeLLM):
    """Keeps what it is made with and asked."""

    made: list
    asked: list
    has_chat_template = True
    default_sampling: dict

    def __init__(self, model, **options):
        self.made.append((model, options))
        self.default_sampling = {}

    def get_tokenizer(self):
        return SimpleNamespace(has_chat_template=self.has_chat_template)

    def stream(self, prompt, params):
        self.asked.append((prompt, params))
        yield CompletionDelta(0, f"answer {len(self.asked)}", [1, 2], "stop")


@pytest.fixture
def listening(monkeypatch):
    """A fresh class of the kind."""
    monkeypatch.setattr(Listening, "made", [], raising=False)
    monkeypatch.setattr(Listening, "asked", [], raising=False)
    return Listening


@pytest.fixture(scope="module")
def demo():
    """The demo model, which commands do not close."""
    with LLM("demo", mesh="tp=1", max_model_len=256, max_num_seqs=1) as llm:
        yield SimpleNamespace(stream=llm.stream, generate=llm.generate, get_tokenizer=llm.get_tokenizer, default_sampling=llm.default_sampling,
                              chat=llm.chat, close=lambda: None)


def answer(llm, capsys, *words: str) -> tuple[str, str]:
    """What is printed on the two streams."""
    assert main(["generate", "demo", "--temp", "0", "-n", "8", *words], make_llm=lambda model, **options: llm) == 0
    return capsys.readouterr()


def test_a_model_with_a_chat_template_answers_and_raw_goes_on_with_the_text(demo, capsys):
    text = "Write a loop."
    expected = demo.chat([{"role": "user", "content": text}], GREEDY)[0].outputs[0].text
    out, err = answer(demo, capsys, "-p", text)
    assert (out, re.fullmatch(SPEED, err) is not None) == (expected + "\n", True)
    raw = demo.generate(text, GREEDY)[0].outputs[0].text
    assert answer(demo, capsys, "-p", text, "--raw", "--quiet") == (raw + "\n", "")
    assert raw != expected


def test_json_has_the_answer_its_tokens_and_times_for_each_line(demo, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("Write a loop.\n\nThanks.\r\n")
    out, err = answer(demo, capsys, "--prompt-file", str(tmp_path / "prompts.txt"), "--lines", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == ["Write a loop.", "Thanks."]
    for row in rows:
        output, = demo.chat([{"role": "user", "content": row["prompt"]}], GREEDY)
        completion = output.outputs[0]
        assert (row["text"], row["finish_reason"]) == (completion.text, completion.finish_reason)
        assert (row["prompt_tokens"], row["completion_tokens"]) == (len(output.prompt_token_ids), len(completion.token_ids))
        assert row["time_to_first_token_s"] > 0
    assert f"tpllm: {sum(row['completion_tokens'] for row in rows)} tokens" in err


def test_the_prompt_is_a_users_message_after_the_system_prompt(listening):
    words = ["generate", "fake", "-p", "hi", "--system", "Be brief.", "--template-kwargs", '{"a": 1}', "--no-parse-special"]
    assert main(words, make_llm=listening) == 0
    prompt, params = listening.asked[0]
    assert prompt == {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}], "template_kwargs": {"a": 1},
                      "parse_special": False}
    assert params.max_tokens == 512


def test_without_a_chat_template_the_prompt_is_text_and_a_system_prompt_is_refused(listening, monkeypatch, capsys):
    monkeypatch.setattr(listening, "has_chat_template", False)
    monkeypatch.setattr(listening, "stream", lambda self, *asked: self.asked.append(asked) or iter([]))
    assert main(["generate", "fake", "-p", "hi"], make_llm=listening) == 0
    assert main(["generate", "fake", "-p", "hi", "--parse-special"], make_llm=listening) == 0
    assert [prompt for prompt, _ in listening.asked] == ["hi", {"prompt": "hi", "parse_special": True}]
    assert capsys.readouterr().err == "tpllm: 0 tokens\n" * 2
    assert main(["generate", "fake", "-p", "hi", "--system", "Be brief."], make_llm=listening) == 2
    assert "the model fake has no chat template; put the text into the prompt" in capsys.readouterr().err


def test_options_come_before_the_models_own_and_those_before_the_commands(listening, monkeypatch):
    monkeypatch.setattr(listening, "__init__", lambda self, model, **_: setattr(self, "default_sampling", {"max_tokens": 9, "temperature": 0.25}))
    for words in ([], ["-n", "3", "--temp", "0"], ["--max-tokens=4", "--stop", ":", "--stop", "1"]):
        assert main(["generate", "fake", "-p", "hi", *words], make_llm=listening) == 0
    found = [(params.max_tokens, params.temperature, params.stop) for _, params in listening.asked]
    assert found == [(9, 0.25, ()), (3, 0, ()), (4, 0.25, (":", "1"))]


@pytest.mark.parametrize(("own", "words", "temperature"), [
    ({}, [], 0), ({}, ["--seed", "7"], 1), ({"top_k": 40}, [], 1), ({"temperature": 0.6}, [], 0.6)])
def test_the_best_token_is_taken_where_neither_the_options_nor_the_model_ask_for_draws(listening, monkeypatch, own, words, temperature):
    monkeypatch.setattr(listening, "__init__", lambda self, model, **_: setattr(self, "default_sampling", own))
    assert main(["generate", "fake", "-p", "hi", *words], make_llm=listening) == 0
    assert listening.asked[0][1].temperature == temperature


def test_an_answer_that_fails_is_one_line_and_code_1(listening, monkeypatch, capsys):
    def fail(*_):
        raise TpllmError("the logits are not finite")
    monkeypatch.setattr(listening, "stream", fail)
    assert main(["generate", "fake", "-p", "hi"], make_llm=listening) == 1
    assert capsys.readouterr() == ("", "tpllm: error: the logits are not finite\n")


def test_only_what_is_given_goes_to_the_engine(listening, monkeypatch):
    monkeypatch.setenv("TPLLM_NUM_THREADS", "")
    assert main(["generate", "-m", "fake", "-p", "hi"], make_llm=listening) == 0
    words = ["--mesh", "dp=2", "--kv-cache-dtype", "int8", "--quantization", "int4", "--dtype", "float32", "--max-model-len", "64", "-t", "3"]
    assert main(["generate", "-p", "hi", "fake", *words], make_llm=listening) == 0
    assert listening.made == [("fake", {"max_num_seqs": 1}), ("fake", {
        "max_num_seqs": 2, "mesh": "dp=2", "kv_cache_dtype": "int8", "quantization": "int4", "dtype": "float32", "max_model_len": 64})]
    from tpllm.environment.threads import num_threads
    assert num_threads() == 3


def test_standard_input_is_one_prompt_without_its_last_line_break_or_one_a_line(listening, monkeypatch, capsys):
    for words in ([], ["--lines"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
        assert main(["generate", "fake", "--raw", "--quiet", *words], make_llm=listening) == 0
    assert main(["generate", "fake", "--raw", "--quiet", "--lines", "-p", "a\nb"], make_llm=listening) == 0
    assert [prompt for prompt, _ in listening.asked] == ["one\n\ntwo", "one", "two", "a", "b"]
    assert capsys.readouterr() == ("".join(f"answer {number}\n" for number in range(1, 6)), "")


def test_the_speed_counts_every_answer(listening, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert main(["generate", "fake", "--lines"], make_llm=listening) == 0
    assert re.fullmatch(r"tpllm: 4 tokens, first token after 0\.\d\d s\n", capsys.readouterr().err)
