"""Tokens that files beside tokenizer.json hold, and what explicit settings change in it; the values are those of transformers 5.24."""
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tests.tokenizer import tokenizer_folders as folders
from tpllm.errors import TokenizerError
from tpllm.tokenizer import Tokenizer

TEXT = "a<|x|> the</y>"


def loaded(path, backend=None, **files):
    return Tokenizer.from_folder(folders.write_folder(path, backend or folders.byte_level_bpe(), **files))


def pieces(tokenizer, text):
    return [tokenizer.piece(token_id) for token_id in tokenizer.encode(text, add_special_tokens=False, parse_special=True)]


@pytest.mark.parametrize(("files", "is_special"), [
    ({"added_tokens": {"<|x|>": 0, "</y>": 1}, "special_tokens_map": {"eos_token": "<|x|>"}}, (True, False)),
    ({"added_tokens": {"<|x|>": 0, "</y>": 1}, "tokenizer_config": {"additional_special_tokens": ["</y>"]}}, (False, True)),
    ({"added_tokens": {"<|x|>": 0, "</y>": 1}, "special_tokens_map": {"additional_special_tokens": ["</y>"]}}, (False, False)),
    ({"special_tokens_map": {"eos_token": {"content": "<|x|>", "lstrip": False}, "additional_special_tokens": ["</y>"]}}, (True, True)),
    ({"tokenizer_config": {"eos_token": "<|x|>", "image_token": "</y>"}}, (True, True)),
    ({"tokenizer_config": {"extra_special_tokens": {"boi": "<|x|>", "eoi": "</y>"}}}, (True, True)),
    ({"tokenizer_config": {"added_tokens_decoder": {"0": {"content": "<|x|>", "special": True}, "1": {"content": "</y>", "special": False}}},
      "added_tokens": {"</y>": 0}}, (True, False)),
])
def test_tokens_that_only_other_files_hold_are_tokens(tmp_path, files, is_special):
    size = folders.byte_level_bpe().get_vocab_size()
    added = {text: size + index for text, index in files.get("added_tokens", {}).items()}
    config = dict(files.get("tokenizer_config", {}))
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {str(size + int(key)): value for key, value in config["added_tokens_decoder"].items()}
    files = {**files, **({"added_tokens": added} if added else {}), "tokenizer_config": config}
    tokenizer = loaded(tmp_path, **files)
    ids = tokenizer.encode(TEXT, add_special_tokens=False, parse_special=True)
    assert [tokenizer.piece(token_id) for token_id in ids] == ["a", "<|x|>", "Ġthe", "</y>"]
    assert [ids[1], ids[3]] == [size, size + 1]
    assert tokenizer.decode(ids) == TEXT
    assert [token_id in tokenizer.special_ids for token_id in (size, size + 1)] == list(is_special)
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"a{'' if is_special[0] else '<|x|>'} the{'' if is_special[1] else '</y>'}"


def test_flags_in_tokenizer_config_go_before_tokenizer_json_and_added_tokens_json_changes_none(tmp_path):
    backend = folders.byte_level_bpe()
    backend.add_tokens([tokenizers.AddedToken("<|x|>", special=False, rstrip=False, normalized=False)])
    token_id = str(backend.token_to_id("<|x|>"))
    stripping = {"content": "<|x|>", "special": True, "rstrip": True, "normalized": False}
    assert pieces(loaded(tmp_path / "a", backend, tokenizer_config={"added_tokens_decoder": {token_id: stripping}}), "<|x|> the") == ["<|x|>", "the"]
    tokenizer = loaded(tmp_path / "b", backend, added_tokens={"<|x|>": int(token_id)}, special_tokens_map={"additional_special_tokens": [stripping]})
    assert pieces(tokenizer, "<|x|> the") == ["<|x|>", "Ġthe"]
    assert not tokenizer.special_ids


def test_special_tokens_map_goes_before_a_config_that_does_not_list_its_added_tokens(tmp_path):
    backend = folders.llama3_like()
    eos = backend.token_to_id("<|eot_id|>")
    files = {"special_tokens_map": {"eos_token": "<|eot_id|>"}}
    assert loaded(tmp_path / "a", backend, tokenizer_config={"eos_token": "<|end_of_text|>"}, **files).eos_token_ids == {eos}
    listing = {"eos_token": "<|end_of_text|>", "added_tokens_decoder": {str(eos): {"content": "<|eot_id|>", "special": True}}}
    assert loaded(tmp_path / "b", backend, tokenizer_config=listing, **files).eos_token_ids == {backend.token_to_id("<|end_of_text|>")}


def test_a_token_whose_id_is_anothers_is_left_out_with_a_word_in_the_log(tmp_path, caplog):
    tokenizer = loaded(tmp_path, added_tokens={"<|x|>": 3, "</y>": 10**6})
    assert "<|x|>" not in pieces(tokenizer, TEXT)
    assert "2 added tokens have ids that are another token's or leave a gap; they are left out: <|x|> (3), </y> (1000000)" in caplog.text


@pytest.mark.parametrize("files", [
    {"added_tokens": {"<|x|>": "1"}}, {"added_tokens": {"<|x|>": True}}, {"added_tokens": {"<|x|>": -1}}, {"added_tokens": {"": 1}},
    {"added_tokens": {"<|x|>": 2**31}}, {"added_tokens": {"\ud800": 330}}, {"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "a"}}}},
    {"tokenizer_config": {"added_tokens_decoder": {"1": "a"}}},
    {"tokenizer_config": {"added_tokens_decoder": {"330": {"content": "a", "lstrip": "yes"}}}}, {"tokenizer_config": {"added_tokens_decoder": [1]}},
    {"tokenizer_config": {"eos_token": "\ud800"}},
    {"tokenizer_config": {"extra_special_tokens": "a"}}, {"tokenizer_config": {"added_tokens_decoder": {"9" * 30: {"content": "a"}}}},
])
def test_tokens_that_are_none_are_refused(tmp_path, files):
    with pytest.raises(TokenizerError, match=r"(added_tokens|tokenizer_config)\.json"):
        loaded(tmp_path, **files)


def metaspace(form):
    """SentencePiece's kind, with the scheme of a newer file, or the normalizer of an older one."""
    backend = folders.sentencepiece_like(prepend_scheme=None if form == "older" else form)
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A", special_tokens=[])
    return backend


@pytest.mark.parametrize("form", ["first", "never", "always", "older"])
@pytest.mark.parametrize(("flags", "starts"), [
    ({"add_prefix_space": True}, (True, False)), ({"add_prefix_space": False}, (False, False)), ({"legacy": True}, (True, True)),
    ({"legacy": False}, (True, False)), ({"add_prefix_space": True, "legacy": True}, (True, True)),
])
def test_add_prefix_space_and_legacy_say_where_a_llama_tokenizer_puts_a_space(tmp_path, form, flags, starts):
    config = {"tokenizer_class": "LlamaTokenizerFast", "unk_token": "<unk>", **flags}
    tokenizer = loaded(tmp_path, metaspace(form), tokenizer_config=config, config={"model_type": "llama"})
    found = pieces(tokenizer, "hel</s>hel")
    assert found == [*(["▁hel"] if starts[0] else ["h", "el"]), "</s>", *(["▁hel"] if starts[1] else ["h", "el"])]
    assert tokenizer.decode(tokenizer.encode(" hel")) == ("hel" if starts[0] else " hel")


@pytest.mark.parametrize(("tokenizer_class", "model_type", "acts"), [
    ("GPT2Tokenizer", "gpt2", True), ("GPT2TokenizerFast", "llama", True), ("Qwen2Tokenizer", "qwen3", True), (None, "starcoder2", True),
    ("PreTrainedTokenizerFast", "qwen2", True), ("PreTrainedTokenizerFast", "llama", False), ("LlamaTokenizer", "llama", False),
    ("GPT2Tokenizer", "granite", False), ("GPT2Tokenizer", "mistral", False), (None, "llama", False), (["x"], 3, False),
])
def test_add_prefix_space_acts_on_byte_level_where_the_class_lets_it(tmp_path, tokenizer_class, model_type, acts):
    for inside in (True, False):
        backend = folders.byte_level_bpe()
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=inside)])
        config = {"add_prefix_space": not inside, **({} if tokenizer_class is None else {"tokenizer_class": tokenizer_class})}
        tokenizer = loaded(tmp_path, backend, tokenizer_config=config, config={"model_type": model_type})
        assert pieces(tokenizer, "hello")[0].startswith("Ġ") == ((not inside) if acts else inside)


def test_split_special_tokens_is_known_and_clean_up_leaves_bpe_alone(tmp_path):
    tokenizer = loaded(tmp_path / "a", folders.chatml_like(), tokenizer_config={"split_special_tokens": True, "clean_up_tokenization_spaces": True})
    assert tokenizer.splits_special
    assert tokenizer.decode(tokenizer.encode("a .b")) == "a .b"
    anyway = {"clean_up_tokenization_spaces": True, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
    tokenizer = loaded(tmp_path / "b", folders.chatml_like(), tokenizer_config=anyway)
    assert tokenizer.decode(tokenizer.encode("a .b n't")) == "a.bn't"
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, ".": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix="##", cleanup=False)
    for cleans_up, text in ((True, "a."), (False, "a .")):
        tokenizer = loaded(tmp_path / "c", words, tokenizer_config={"clean_up_tokenization_spaces": cleans_up})
        assert tokenizer.decode([0, 1]) == text
