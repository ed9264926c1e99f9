"""Conversations made of a module's own definitions."""
import ast
import pathlib

import numpy as np
import pytest
import tokenizers

from tools.demo_training.conversations import (
    MAX_ANSWER_CHARS,
    MAX_SUMMARY_CHARS,
    Definition,
    answer_mask,
    conversations,
    definitions,
    definitions_of,
    encode,
    first_sentence,
)
from tools.demo_training.corpus import BOS, EOS, TURN, TURN_END
from tools.demo_training.models import DEMO
from tpllm.tokenizer.tokenizer import Tokenizer

MODULE = '''
import os

@cache
def size(path, *, follow=True):
    """Return the size of a file.

    More of it.
    """
    def inner(x):
        return x
    return os.stat(path).st_size


class Reader(Base):
    """Reads lines."""

    def next(self):
        for line in self.lines:
            yield line
'''


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(DEMO.folder)


@pytest.fixture(scope="module")
def held_out():
    return definitions(is_held_out=True)


def of_module() -> dict[str, Definition]:
    return {one.name: one for one in definitions_of(MODULE, ast.parse(MODULE), "files")}


def test_functions_classes_methods_and_loops_are_found_with_what_is_said_of_them():
    found = of_module()
    assert {name: (one.kind, one.owner) for name, one in found.items()} == {
        "size": ("function", "files"), "Reader": ("class", "files"), "next": ("method", "Reader"), "over self.lines": ("loop", "Reader")}
    assert found["size"].summary == "Return the size of a file."
    assert found["size"].arguments == ("path", "follow")
    assert found["next"].arguments == ()
    assert found["over self.lines"].code == "for line in self.lines:\n    yield line"


def test_the_body_is_the_code_without_its_docstring():
    size = of_module()["size"]
    assert size.code.startswith("@cache\ndef size(path, *, follow=True):\n    \"\"\"Return")
    assert size.body == "@cache\ndef size(path, *, follow=True):\n    def inner(x):\n        return x\n    return os.stat(path).st_size"


@pytest.mark.parametrize(("docstring", "sentence"), [
    ("Return x.", "Return x."), ("Return x.\n\nAnd y.", "Return x."), ("Return the\n    sum. Or not.", "Return the sum."), ("", ""),
    ("Version 1.2 of it.", "Version 1.2 of it."), ("no capital.", ""), ("No end", ""), ("Ends below\n\nhere.", ""),
    ("A" + "b" * MAX_SUMMARY_CHARS + ".", ""),
])
def test_the_first_sentence_of_a_docstring_is_whole_or_nothing(docstring, sentence):
    assert first_sentence(docstring) == sentence


def test_a_conversation_is_questions_and_answers_in_turn_after_a_system_line_or_none(held_out):
    made = conversations(held_out, np.random.default_rng(0))
    assert len(made) == len(held_out)
    shapes = {tuple(message["role"] for message in messages) for messages in made}
    turn = ("user", "assistant")
    assert shapes == {turn, turn * 2, ("system", *turn), ("system", *turn * 2)}
    assert all(message["content"].strip() for messages in made for message in messages)


def test_an_answer_is_short_and_the_librarys_own_text(held_out):
    own = {one.code for one in held_out} | {one.summary for one in held_out}
    made = conversations(held_out, np.random.default_rng(0), has_small_talk=False)
    answers = [[message["content"] for message in messages if message["role"] == "assistant"] for messages in made]
    assert {first for first, *_ in answers} <= own
    assert max(len(answer) for turns in answers for answer in turns) <= MAX_ANSWER_CHARS
    followed = {second for _, *rest in answers for second in rest} - own
    assert all(answer.startswith(("Its argument", "It takes no arguments", "You are welcome", "Goodbye")) for answer in followed)


def test_code_that_answers_is_a_whole_piece_of_python(held_out):
    for one in held_out:
        ast.parse(one.code)


def test_a_seed_makes_the_same_conversations_and_another_one_others(held_out):
    first, again, other = (conversations(held_out, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.slow
def test_nothing_is_asked_about_held_out_files_in_training(held_out):
    trained = {(one.kind, one.owner, one.name, one.code) for one in definitions(is_held_out=False) if one.kind in ("function", "class")}
    shared = [one for one in held_out if (one.kind, one.owner, one.name, one.code) in trained]
    assert not shared
    assert 0.02 < len(held_out) / len(trained) < 1


def test_a_conversation_is_encoded_as_its_template_is_written(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Write f."},
                {"role": "assistant", "content": "def f():\n    pass"}]
    text = ("<|bos|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWrite f.<|im_end|>\n"
            "<|im_start|>assistant\ndef f():\n    pass<|im_end|>\n<|eos|>")
    backend = tokenizers.Tokenizer.from_file(str(pathlib.Path(DEMO.folder) / "tokenizer.json"))
    assert encode([messages], tokenizer)[0].tolist() == backend.encode(text, add_special_tokens=False).ids


def test_special_text_in_the_librarys_code_is_plain_text_in_training(tokenizer):
    messages = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "x = '<|im_start|>assistant\\n'"}]
    ids = encode([messages], tokenizer)[0].tolist()
    assert [ids.count(special) for special in (BOS, TURN, TURN_END, EOS)] == [1, 2, 2, 1]


def test_the_mask_holds_every_answer_with_its_end_and_nothing_else(tokenizer, held_out):
    for messages in conversations(held_out[:100], np.random.default_rng(0)):
        ids = encode([messages], tokenizer)[0]
        masked = tokenizer.decode(ids[answer_mask(ids, tokenizer)], skip_special_tokens=False)
        assert masked == "".join(message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant")
