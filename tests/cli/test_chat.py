"""The interactive chat: what it remembers, its commands, and its errors."""
import io
import json
import os
import pathlib
import pty
import re
import subprocess
import sys
import termios

import pytest

from tests.jobs.fake_llm import FakeLLM
from tpllm import LLM
from tpllm.cli.chat import COMMANDS, banner
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
        yield CompletionOutput(0, "answer ", [1])
        yield CompletionOutput(0, str(len(prompt["messages"])), [2, 3])


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
    asked, _, err = talk("one", "/clear", "two", "/system Other.", "three", "/system", "four", "/clea", "/exit", "never", options=("--system", "S."))
    assert [messages[0] for messages in asked] == [("system", "S."), ("system", "S."), ("system", "Other."), ("user", "four")]
    assert [messages[-1][1] for messages in asked] == ["one", "two", "three", "four"]
    assert "tpllm: unknown command /clea; did you mean '/clear'? /help shows the commands" in err


def test_an_answer_is_given_again_to_the_same_messages(talk):
    asked, _, err = talk("/regen", "one", "/regen", "two", "/regen")
    first = [("user", "one")]
    second = [*first, ("assistant", "answer 1"), ("user", "two")]
    assert asked == [first, first, second, second]
    assert "tpllm: there is no answer yet" in err
    assert "at temperature 0 the answer stays the same" in talk("one", "/regen", options=("--temp", "0"))[2]


def test_a_message_of_several_lines_stands_between_three_quotation_marks(talk):
    asked, _, _ = talk('"""', "/first", "  second", '"""', '"""one', 'two"""', '"""three"""', '"""', "without an end")
    assert [messages[-1][1] for messages in asked] == ["/first\n  second", "one\ntwo", "three"]


def test_a_saved_conversation_is_a_row_of_a_job(talk, tmp_path):
    path = tmp_path / "talk.jsonl"
    _, _, err = talk("é", f"/save {path}", f"/save {path}", "/save", "/save /no/such/folder/x")
    row = json.loads(path.read_text())
    assert row == {"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "answer 1"}]}
    for message in (f"cannot write {path}: File exists", "write the file's name, as in /save talk.jsonl", "cannot write /no/such/folder/x: No"):
        assert f"tpllm: {message}" in err


def test_the_speed_follows_each_answer_unless_it_is_quiet(talk):
    _, _, err = talk("one", "two")
    assert re.fullmatch(r"(tpllm: 3 tokens, \d[\d.]* tokens/s, first token after \d\.\d\d s\n){2}", err)
    assert talk("one", options=("--quiet",))[2] == ""


def test_help_shows_every_command(talk):
    _, _, err = talk("/help")
    assert all(f"    {command}" in err for command in COMMANDS)


def test_an_interrupted_answer_stays_as_far_as_it_came(talk):
    asked, out, _ = talk("stop me", "next")
    assert asked[1] == [("user", "stop me"), ("assistant", "half"), ("user", "next")]
    assert out == "half\nanswer 3\n"


def test_a_turn_that_does_not_fit_is_dropped_and_said(talk):
    asked, _, err = talk("hello", "too long", "again")
    assert asked[2] == [("user", "hello"), ("assistant", "answer 1"), ("user", "again")]
    assert "the prompt has 9 tokens; /clear begins anew" in err


def test_template_variables_are_handed_on(talk):
    talk("x", options=("--template-kwargs", '{"enable_thinking": false}'))
    assert Listening.asked[0][1] == {"enable_thinking": False}


@pytest.mark.parametrize("text", ["{", "[1]", "no"])
def test_template_variables_that_are_no_object_are_refused(text, capsys):
    assert main(["chat", "--model", "fake", "--template-kwargs", text], make_llm=Listening) == 2
    line, = capsys.readouterr().err.splitlines()
    assert "give a JSON object" in line


def test_the_banner_names_the_model_its_kernels_and_its_context():
    with LLM("demo", mesh="tp=1", max_model_len=64, max_num_seqs=1) as llm:
        assert f": demo, kernels: {llm.fingerprint()['kernels']}, context: 64 tokens; /help shows the commands" in banner("demo", llm)


SCRIPT = """
import sys, time
import tpllm.cli.chat
from tests.jobs.fake_llm import FakeLLM
from tpllm.cli import entry
class Slow(FakeLLM):
    def stream(self, prompt, params):
        yield from super().stream("x", params)
        print("typing", end="", flush=True)
        time.sleep(0.5)
tpllm.cli.chat.banner = lambda model, llm: "banner"
sys.argv[1:] = ["chat", "fake"]
sys.exit(entry.main(make_llm=Slow))
"""


def test_ctrl_d_that_is_typed_while_it_answers_ends_the_chat_after_the_answer():
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=pathlib.Path(__file__).parents[2], stdin=theirs, stdout=theirs, stderr=theirs,
                               env=os.environ | {"TERM": "dumb"})
    shown = b""
    for expected, typed in ((b"> ", b"hello\n"), (b"typing", b"\x04")):
        while expected not in shown:
            shown += os.read(ours, 4096)
        os.write(ours, typed)
    assert process.wait(timeout=30) == 0
    assert termios.tcgetattr(theirs) == before
    assert b"banner" in shown
    for side in (ours, theirs):
        os.close(side)
