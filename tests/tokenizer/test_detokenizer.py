"""Streamed text is the decoded text, in whole characters, in constant time a token."""
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders

from tests.tokenizer import tokenizer_folders as folders
from tpllm.tokenizer import Detokenizer, Tokenizer
from tpllm.tokenizer.decoder_stages import CLEANED_UP, clean_up_stages, run_stages

DECODERS = {
    "none": None,
    "wordpiece": decoders.WordPiece(),
    "metaspace": decoders.Metaspace(),
    "metaspace_never": decoders.Metaspace(prepend_scheme="never"),
    "suffix": decoders.BPEDecoder(),
    "ctc": decoders.CTC(pad_token="|"),
    "byte_level_then_strip": decoders.Sequence([decoders.ByteLevel(), decoders.Strip("a", 2, 0)]),
    "joined_replace": decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("é", "e"), decoders.Strip("▁", 1, 0)]),
    "joined_regex": decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("a+"), "x")]),
    "nested": decoders.Sequence([decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()]), decoders.Strip(" ", 1, 0),
                                 decoders.Fuse()]),
}


@pytest.fixture(scope="module")
def by_decoder(tmp_path_factory, kinds):
    root = tmp_path_factory.mktemp("decoders")
    odd = {name: Tokenizer.from_folder(folders.write_folder(root / name, folders.plain_words(decoder))) for name, decoder in DECODERS.items()}
    odd["cleaned_up"] = Tokenizer.from_folder(folders.write_folder(root / "cleaned_up", folders.plain_words(decoders.WordPiece(cleanup=False)),
                                                                   tokenizer_config={"clean_up_tokenization_spaces": True}))
    return {**odd, **{name: kinds[name] for name in ("llama3", "mistral", "mistral_legacy", "qwen3")}}


def streamed(tokenizer, chunks, **options):
    detokenizer = Detokenizer(tokenizer, **options)
    return [*(detokenizer.push(chunk) for chunk in chunks), detokenizer.finish()]


@pytest.mark.parametrize("name", [*DECODERS, "cleaned_up", "llama3", "mistral", "mistral_legacy", "qwen3"])
@pytest.mark.parametrize("skips", [True, False])
def test_pushes_and_the_end_join_to_the_decoded_text_for_any_ids(by_decoder, name, skips):
    tokenizer = by_decoder[name]
    most = tokenizer.vocab_size + 2

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.lists(st.integers(-1, most), max_size=12), max_size=6))
    def check(chunks):
        ids = [token_id for chunk in chunks for token_id in chunk]
        assert "".join(streamed(tokenizer, chunks, skip_special_tokens=skips)) == tokenizer.decode(ids, skip_special_tokens=skips)
    check()


@pytest.mark.parametrize("name", ["llama3", "mistral"])
@pytest.mark.parametrize("text", ["hello 日本語 😀 naïve ", "lo  lo\n\n\tel ", "e\u0301👩‍👩‍👧 hello"])
def test_a_text_comes_back_in_whole_characters(by_decoder, name, text):
    tokenizer = by_decoder[name]
    parts = streamed(tokenizer, [[token_id] for token_id in tokenizer.encode(text)])
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)


@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_text_is_given_as_soon_as_it_is_certain(by_decoder, name):
    tokenizer = by_decoder[name]
    ids = tokenizer.encode("hello é", add_special_tokens=False)
    parts = streamed(tokenizer, [[token_id] for token_id in ids])
    assert "".join(parts[:len(ids) - 2]) == "hello "
    assert "".join(parts[-2:]) == "é"


@pytest.mark.parametrize(("name", "num_missing"), [("llama3", 1), ("mistral", 3)])
def test_an_unfinished_character_ends_in_replacement_characters(by_decoder, name, num_missing):
    tokenizer = by_decoder[name]
    ids = tokenizer.encode("hello😀", add_special_tokens=False)[:-1]
    parts = streamed(tokenizer, [[token_id] for token_id in ids])
    assert "".join(parts[:-1]) == "hello"
    assert parts[-1] == "\ufffd" * num_missing


def test_a_finished_detokenizer_has_nothing_more(by_decoder):
    detokenizer = Detokenizer(by_decoder["mistral"])
    detokenizer.push([3 + 0xE2])
    assert [detokenizer.finish(), detokenizer.finish()] == ["\ufffd", ""]


@pytest.mark.parametrize("name", ["llama3", "mistral", "wordpiece", "metaspace", "suffix"])
def test_what_is_held_does_not_grow_with_the_text(by_decoder, name):
    tokenizer = by_decoder[name]
    token_id = next(i for i in range(tokenizer.vocab_size) if tokenizer.piece(i) in ("lo", "h"))
    parts = streamed(tokenizer, [[token_id]] * 400)
    assert all(parts[1:400])


@pytest.mark.parametrize(("texts", "expected"), [
    (["a", " .", " n't", " ' ", "b"], "a.n't'b"), ([" ", "'", " ", "'", " "], "'' "),
    ([" '", "m x ", "?", " '", "r", "e", " '"], "'m x?'re '"), ([" " * 9, "."], " " * 8 + "."),
])
def test_spaces_before_punctuation_are_taken_away_as_by_one_replacement_after_the_other(texts, expected):
    whole = "".join(texts)
    for old, new in CLEANED_UP:
        whole = whole.replace(old, new)
    assert run_stages(clean_up_stages(), texts, is_last=True) == whole == expected
