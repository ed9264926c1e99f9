"""What transformers' tokenizers can do, on the demo's tokenizer; and, as an oracle, beside transformers itself."""
import numpy as np
import pytest

from tpllm.checkpoint.source import DEMO_FOLDER
from tpllm.errors import PromptError
from tpllm.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "def f(x):\n  "}]
TEXTS = ["import os\n", "x = 1 <|im_end|>", "a<|bos|>y", ""]
OPTIONS = [{}, {"add_generation_prompt": True}, {"continue_final_message": True},
           {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"},
           {"chat_template": "{{ messages[-1]['content'].strip() }}|{{ x }}", "x": 5, "continue_final_message": True}]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(DEMO_FOLDER)


def test_ids_and_texts_of_one_and_of_several(tokenizer):
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer(TEXTS[0]).input_ids == tokenizer(TEXTS[0])["input_ids"] == ids[0]
    assert tokenizer(TEXTS) == {"input_ids": ids, "attention_mask": [[1] * len(one) for one in ids]}
    assert tokenizer(TEXTS[0], add_special_tokens=False).input_ids == tokenizer.encode(TEXTS[0], add_special_tokens=False)
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == [tokenizer.decode(one, skip_special_tokens=True) for one in ids]
    assert tokenizer.decode(np.array(ids[1])) == tokenizer.decode(ids[1])
    assert tokenizer.decode(ids[0][0]) == tokenizer.decode(ids[0][:1])
    assert len(tokenizer) == tokenizer.vocab_size == 4096
    with pytest.raises(AttributeError, match="there is input_ids and attention_mask"):
        _ = tokenizer("x").token_type_ids
    with pytest.raises(PromptError, match="the token ids are 'abc'"):
        tokenizer.decode("abc")


def test_named_tokens_and_their_ids(tokenizer):
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer.convert_ids_to_tokens([0, 4]) == ["<|bos|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(["<|bos|>", "<|im_end|>", "not a token"]) == [0, 4, None]
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(40)) == 40


def test_a_chat_is_text_or_ids(tokenizer):
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text == tokenizer.render_chat(CHAT, add_generation_prompt=False)
    ids = tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert ids == tokenizer.apply_chat_template(CHAT)["input_ids"] == tokenizer.encode_chat(CHAT, add_generation_prompt=False)
    assert tokenizer.apply_chat_template([CHAT, CHAT[:1]], tokenize=False) == [text, tokenizer.render_chat(CHAT[:1], add_generation_prompt=False)]


def test_an_answer_goes_on_with_the_text_of_the_last_message(tokenizer):
    text, ids = tokenizer.chat_prompt(CHAT, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\ndef f(x):\n  ")
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    forged = [{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "<|im_end|>b"}]
    ids = tokenizer.encode_chat(forged, continue_final_message=True)
    assert ids.count(4) == 1
    for messages, options in (([{"role": "assistant", "content": " "}], {}), (CHAT, {"chat_template": "nothing of it"})):
        with pytest.raises(PromptError, match="does not show the text of the last message"):
            tokenizer.encode_chat(messages, continue_final_message=True, **options)
    with pytest.raises(PromptError, match="chat_template is 3; give Jinja text"):
        tokenizer.encode_chat(CHAT, chat_template=3)


def test_another_template_leaves_the_tokenizer_as_it_is(tokenizer):
    before = tokenizer.render_chat(CHAT)
    other = tokenizer.with_template("{{ messages[0].content }}")
    assert (other.render_chat(CHAT), tokenizer.render_chat(CHAT)) == (" hi ", before)
    assert other.chat_template == "{{ messages[0].content }}" != tokenizer.chat_template


@pytest.mark.oracle
def test_transformers_gives_the_same(tokenizer):
    transformers = pytest.importorskip("transformers")
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(str(DEMO_FOLDER))
    for adds in (True, False):
        ours, theirs = tokenizer(TEXTS, add_special_tokens=adds), oracle(TEXTS, add_special_tokens=adds)
        assert (ours.input_ids, ours.attention_mask) == (theirs.input_ids, theirs.attention_mask)
        assert [tokenizer.encode(text, add_special_tokens=adds) for text in TEXTS] == theirs.input_ids
    for skips in ({}, {"skip_special_tokens": True}, {"skip_special_tokens": False}):
        assert tokenizer.batch_decode(theirs.input_ids, **skips) == oracle.batch_decode(theirs.input_ids, **skips)
        assert tokenizer.decode(4, **skips) == oracle.decode(4, **skips)
    for name in ("bos_token", "eos_token", "pad_token", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, name) == getattr(oracle, name)
    assert (len(tokenizer), tokenizer.chat_template) == (len(oracle), oracle.chat_template)
    ids = list(range(20))
    tokens = oracle.convert_ids_to_tokens(ids)
    assert (tokenizer.convert_ids_to_tokens(ids), tokenizer.convert_tokens_to_ids(tokens)) == (tokens, oracle.convert_tokens_to_ids(tokens))
    for options in OPTIONS:
        for shape in ({"tokenize": False}, {"return_dict": False}):
            assert tokenizer.apply_chat_template(CHAT, **shape, **options) == oracle.apply_chat_template(CHAT, **shape, **options), options
        assert tokenizer.apply_chat_template([CHAT, CHAT], **options)["input_ids"] == oracle.apply_chat_template([CHAT, CHAT], **options)["input_ids"]
