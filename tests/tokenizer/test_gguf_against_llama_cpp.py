"""Tokenizers of GGUF files cut texts as llama.cpp does, and give its text back."""
import json
import pathlib

import pytest

import tpllm
from tests.support.gguf_files import add_byte_level_tokenizer, add_sentencepiece, silence, write_gguf, write_vocabulary
from tests.tokenizer import gguf_vocabularies as vocabularies
from tpllm.checkpoint.gguf.header import open_gguf
from tpllm.tokenizer import Tokenizer
from tpllm.tokenizer.gguf import tokenizer_from_gguf
from tpllm.tokenizer.pre_tokenizers import WORD_RULES

pytestmark = pytest.mark.oracle
DEMO = pathlib.Path(tpllm.__file__).parent / "demo"
OWN_CLASSES = ("tekken", "gpt-4o", "llama4")
"""Whose letters llama.cpp takes without the marks that the models' own patterns have: texts with marks are left out."""
MAX_PIECE = 30
"""Bytes of a piece that llama-cpp-python's detokenize does not cut."""


def open_both(path: pathlib.Path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python comes with the oracle extra")
    silence(llama_cpp)
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False), tokenizer_from_gguf(open_gguf(path))


def assert_same(llama, ours: Tokenizer, texts, *, adds_space: bool = False) -> None:
    bos = [ours.bos_token_id] if adds_space else []  # behind it llama-cpp-python takes a space off
    for text in texts:
        for parse_special in (False, True):
            expected = llama.tokenize(text.encode(), add_bos=True, special=parse_special)
            assert ours.encode(text, parse_special=parse_special) == expected, (text, parse_special)
        ids = llama.tokenize(text.encode(), add_bos=False)
        if all(len(ours.piece(token_id).encode()) <= MAX_PIECE for token_id in ids):
            assert ours.decode(ids) == llama.detokenize([*bos, *ids]).decode("utf-8", "replace"), text


@pytest.mark.parametrize("pre", WORD_RULES)
def test_byte_level_bpe_cuts_as_llama_cpp(tmp_path, pre):
    tokenizer = vocabularies.byte_level(pre)
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}

    def add(writer):
        add_byte_level_tokenizer(writer, tokenizer, pre=pre, bos=ids["<|endoftext|>"], eos=ids["<|im_end|>"], add_bos=None)
    llama, ours = open_both(write_vocabulary(tmp_path / "vocabulary.gguf", add))
    texts = vocabularies.texts(has_marks=pre not in OWN_CLASSES)
    assert_same(llama, ours, [text for text in texts if pre not in OWN_CLASSES or not {"\u0301", "\u0300", "\u093f"} & set(text)])
    assert ours.eos_token_ids == {ids["<|im_end|>"], ids["<|endoftext|>"]}


@pytest.mark.parametrize("adds_space", [True, False])
def test_sentencepiece_cuts_as_llama_cpp(tmp_path, adds_space):
    def add(writer):
        add_sentencepiece(writer, list(vocabularies.sentencepiece()), add_space_prefix=adds_space)
    llama, ours = open_both(write_vocabulary(tmp_path / "vocabulary.gguf", add))
    assert_same(llama, ours, vocabularies.texts(), adds_space=adds_space)


def test_the_demo_model_as_gguf_has_the_tokenizer_of_its_folder(tmp_path):
    write_gguf(tmp_path / "demo.gguf", DEMO, "F32")
    llama, ours = open_both(tmp_path / "demo.gguf")
    assert_same(llama, ours, vocabularies.texts())
    folder = Tokenizer.from_folder(DEMO)
    for text in vocabularies.texts():
        assert ours.encode(text) == folder.encode(text), text
    assert ours.bos_token_id == folder.bos_token_id
    assert json.loads((DEMO / "config.json").read_text())["eos_token_id"] in ours.eos_token_ids
