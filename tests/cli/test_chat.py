"""The interactive chat: what it remembers, its commands, and its errors."""
import io

import pytest

from tests.jobs.fake_llm import FakeLLM
from tpllm.cli.main import main
from tpllm.engine.outputs import CompletionOutput
from tpllm.errors import PromptError


class Listening(FakeLLM):
    """Answers every conversation with the number of its messages, and keeps what it was asked."""

    asked: list

    def stream(self, prompt, params):
        self.asked.append(([(message["role"], message["content"]) for message in prompt["messages"]], prompt["template_kwargs"]))
        if "too long" in prompt["messages"][-1]["content"]:
            raise PromptError("the prompt has 9 tokens")
        if "stop me" in prompt["messages"][-1]["content"]:
            yield CompletionOutput(0, "half")
            raise KeyboardInterrupt
        yield CompletionOutput(0, "answer ")
        yield CompletionOutput(0, str(len(prompt["messages"])))


@pytest.fixture
def talk(monkeypatch, capsys):
    """Types some lines; returns what the model was asked, and the terminal's two streams."""
    def talk(*lines: str, options: tuple[str, ...] = ()):
        monkeypatch.setattr(Listening, "asked", [], raising=False)
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert main(["chat", "--model", "fake", *options], make_llm=Listening) == 0
        captured = capsys.readouterr()
        return [messages for messages, _ in Listening.asked], captured.out, captured.err
    return talk


def test_each_turn_sees_the_whole_conversation(talk):
    asked, out, _ = talk("hello", "", "and then?", options=("--system", "Be brief."))
    assert asked == [
        [("system", "Be brief."), ("user", "hello")],
        [("system", "Be brief."), ("user", "hello"), ("assistant", "answer 2"), ("user", "and then?")],
    ]
    assert out == "answer 2\nanswer 4\n"


def test_commands_begin_anew_and_leave(talk):
    asked, _, err = talk("one", "/reset", "two", "/system Other.", "three", "/system", "four", "/what", "/exit", "never", options=("--system", "S."))
    assert [messages[0] for messages in asked] == [("system", "S."), ("system", "S."), ("system", "Other."), ("user", "four")]
    assert [messages[-1][1] for messages in asked] == ["one", "two", "three", "four"]
    assert "unknown command /what" in err


def test_an_interrupted_answer_stays_as_far_as_it_came(talk):
    asked, out, _ = talk("stop me", "next")
    assert asked[1] == [("user", "stop me"), ("assistant", "half"), ("user", "next")]
    assert out == "half\nanswer 3\n"


def test_a_turn_that_does_not_fit_is_dropped_and_said(talk):
    asked, _, err = talk("hello", "too long", "again")
    assert asked[2] == [("user", "hello"), ("assistant", "answer 1"), ("user", "again")]
    assert "the prompt has 9 tokens; /reset begins anew" in err


def test_template_variables_are_handed_on(talk):
    talk("x", options=("--template-kwargs", '{"enable_thinking": false}'))
    assert Listening.asked[0][1] == {"enable_thinking": False}


@pytest.mark.parametrize("text", ["{", "[1]", "no"])
def test_template_variables_that_are_no_object_are_refused(text, capsys):
    assert main(["chat", "--model", "fake", "--template-kwargs", text], make_llm=Listening) == 2
    line, = capsys.readouterr().err.splitlines()
    assert "give a JSON object" in line
