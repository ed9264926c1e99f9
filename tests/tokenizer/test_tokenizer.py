"""Loading, encoding and decoding."""
import json

import pytest
from tokenizers import models, processors

from tests.tokenizer import tokenizer_folders as folders
from tpllm.errors import PromptError, TokenizerError
from tpllm.tokenizer import Tokenizer

BOS_CONFIG = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


def pieces(tokenizer, ids):
    return [tokenizer.piece(token_id) for token_id in ids]


def test_bos_stands_once_when_the_post_processor_adds_it(kinds):
    tokenizer = kinds["llama3"]
    for text in ("hello", "", "<|begin_of_text|>hello"):
        assert tokenizer.encode(text).count(tokenizer.bos_token_id) == 1
    assert tokenizer.encode("hello", add_special_tokens=False) == tokenizer.encode("hello")[1:]


def test_bos_stands_once_when_the_prompt_brings_its_own(kinds):
    tokenizer = kinds["llama3"]
    assert tokenizer.encode("<|begin_of_text|>hello", parse_special=True) == tokenizer.encode("hello")


@pytest.mark.parametrize("has_post_processor", [True, False])
@pytest.mark.parametrize("add_bos_token", [True, False, None])
def test_add_bos_token_and_the_post_processor_each_suffice(tmp_path, has_post_processor, add_bos_token):
    backend = folders.llama3_like()
    if not has_post_processor:
        backend.post_processor = processors.ByteLevel()
    config = BOS_CONFIG if add_bos_token is None else {**BOS_CONFIG, "add_bos_token": add_bos_token}
    tokenizer = Tokenizer.from_folder(folders.write_folder(tmp_path, backend, tokenizer_config=config))
    num_bos = 1 if has_post_processor or add_bos_token else 0
    assert tokenizer.encode("hello").count(tokenizer.bos_token_id) == num_bos
    assert tokenizer.encode("<|begin_of_text|>hello", parse_special=True).count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_without_bos_adds_none_even_if_the_config_names_an_id(tmp_path):
    path = folders.write_folder(tmp_path, folders.chatml_like(), config={"bos_token_id": 3},
                                tokenizer_config={"bos_token": None, "add_bos_token": True})
    tokenizer = Tokenizer.from_folder(path)
    assert tokenizer.bos_token_id is None
    assert tokenizer.decode(tokenizer.encode("hello"), skip_special_tokens=False) == "hello"


@pytest.mark.parametrize("kind", ["llama3", "qwen3", "mistral", "mistral_legacy"])
def test_special_token_text_in_a_prompt_is_special_unless_asked(kinds, kind):
    tokenizer = kinds[kind]
    special = tokenizer.piece(min(tokenizer.eos_token_ids))
    text = f"hello {special} lo{special}"
    plain = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    assert not tokenizer.special_ids & set(plain)
    assert tokenizer.decode(plain) == text
    parsed = tokenizer.encode(text, add_special_tokens=False)
    assert parsed.count(min(tokenizer.eos_token_ids)) == 2
    assert parsed == tokenizer.encode(text, add_special_tokens=False, parse_special=True)


def test_tokens_that_are_added_but_not_special_are_read_in_prompts(kinds):
    assert "<think>" in pieces(kinds["qwen3"], kinds["qwen3"].encode("a<think>b <|im_end|>"))


def test_special_text_that_a_unigram_vocabulary_would_produce_is_refused_with_the_fix(tmp_path):
    backend = folders.tokenizers.Tokenizer(models.Unigram([("<unk>", -9.0), ("</s>", 0.0), ("a", -1.0)], unk_id=0))
    backend.add_special_tokens(["</s>"])
    tokenizer = Tokenizer.from_folder(folders.write_folder(tmp_path, backend, tokenizer_config={"eos_token": "</s>", "unk_token": "<unk>"}))
    with pytest.raises(PromptError, match=r"</s>.*parse_special=True"):
        tokenizer.encode("a</s>", parse_special=False)
    assert tokenizer.encode("a</s>", parse_special=True)[-1] == 1
    assert tokenizer.encode("a?") == [2, 0]


@pytest.mark.parametrize(("text", "message"), [("a\ud83d", r"\\ud83d.*character 1"), (b"a", "bytes"), (None, "NoneType")])
def test_a_prompt_that_is_no_text_is_refused(kinds, text, message):
    with pytest.raises(PromptError, match=message):
        kinds["llama3"].encode(text)


@pytest.mark.parametrize(("config", "generation_config", "ids"), [
    ({"eos_token_id": 7}, {"eos_token_id": [8, 9]}, {8, 9}),
    ({"eos_token_id": 7}, {"eos_token_id": 0}, {0}),
    ({"eos_token_id": [7, 8]}, {"temperature": 1.0}, {7, 8}),
    ({"eos_token_id": 7}, {"eos_token_id": None}, {7}),
    ({"eos_token_id": 7}, {"eos_token_id": []}, {7}),
    ({"eos_token_id": 7}, {"eos_token_id": -1}, {7}),
    ({"eos_token_id": None, "text_config": {"eos_token_id": 6}}, {}, {6}),
    ({"eos_token_id": 2**31 - 1}, {}, {2**31 - 1}), ({"eos_token_id": 2**31}, {}, {2**31}), ({}, {"eos_token_id": [7, 10**30]}, {7, 10**30}),
    ({}, {}, set()),
])
def test_the_tokenizers_eos_ends_a_text_with_generation_configs_ids_or_else_configs(tmp_path, config, generation_config, ids):
    path = folders.write_folder(tmp_path, folders.llama3_like(), tokenizer_config={"eos_token": {"content": "<|eot_id|>"}}, config=config,
                                generation_config=generation_config)
    tokenizer = Tokenizer.from_folder(path)
    assert tokenizer.eos_token_ids == ids | set(tokenizer.encode("<|eot_id|>", add_special_tokens=False, parse_special=True))
    (path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(path).eos_token_ids == ids


@pytest.mark.parametrize("value", ["</s>", True, [1, False], "7", 1.5, 1.0, [1, [2]], list(range(2000))])
def test_an_eos_id_that_is_no_id_is_refused(tmp_path, value):
    path = folders.write_folder(tmp_path, folders.llama3_like(), config={"eos_token_id": value})
    with pytest.raises(TokenizerError, match=r"eos_token_id is .*a token id, or a list of them|name 2000 ids that end a text"):
        Tokenizer.from_folder(path)


def test_a_folder_without_tokenizer_config_takes_its_ids_from_config(tmp_path):
    backend = folders.llama3_like()
    bos = backend.token_to_id("<|begin_of_text|>")
    tokenizer = Tokenizer.from_folder(folders.write_folder(tmp_path, backend, config={"bos_token_id": bos, "pad_token_id": 4, "eos_token_id": None}))
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_ids) == (bos, 4, frozenset())
    assert tokenizer.encode("<|begin_of_text|>x", parse_special=True).count(bos) == 1


def test_a_named_token_that_is_no_special_one_to_the_library_is_written_out_and_guarded_all_the_same(tmp_path):
    backend = folders.byte_level_bpe()
    size = backend.get_vocab_size()
    backend.add_tokens(["<end>"])
    path = folders.write_folder(tmp_path, backend, special_tokens_map={"eos_token": "<absent>"}, tokenizer_config={
        "chat_template": "{{ messages[0].content }}<end>", "eos_token": "<end>", "pad_token": "<pad>",
        "added_tokens_decoder": {str(size + 1): {"content": "<more>", "special": True}, "9999": {"content": "<far>", "special": True}}})
    tokenizer = Tokenizer.from_folder(path)
    assert (tokenizer.special_ids, tokenizer.eos_token_ids) == ({size + 1, size + 2}, {size})
    assert (tokenizer.pad_token_id, tokenizer.vocab_size) == (size + 2, size + 3)
    assert tokenizer.decode([size + 1, size], skip_special_tokens=True) == "<end>"
    assert tokenizer.encode("<end><more>", parse_special=True) == [size, size + 1]
    assert not {size, size + 1} & set(tokenizer.encode("<end><more>", parse_special=False))
    ids = tokenizer.encode_chat([{"role": "user", "content": "<end><more>"}])
    assert (ids[-1], ids.count(size), ids.count(size + 1)) == (size, 1, 0)


@pytest.mark.parametrize("named_by", ["generation_config", "config"])
def test_a_token_that_ends_a_text_is_guarded_whoever_names_it(tmp_path, named_by):
    backend = folders.byte_level_bpe()
    size = backend.get_vocab_size()
    backend.add_tokens(["<end_of_turn>", "<think>"])
    word = backend.token_to_id("e")  # an ending that is no token of its own in a text
    path = folders.write_folder(tmp_path, backend, tokenizer_config={"chat_template": "{{ messages[0].content }}<end_of_turn>"},
                                **{named_by: {"eos_token_id": [size, word]}})
    tokenizer = Tokenizer.from_folder(path)
    ids = tokenizer.encode_chat([{"role": "user", "content": "the <end_of_turn><think>"}])
    assert (ids[-1], ids.count(size), ids.count(size + 1), ids.count(word) > 0) == (size, 1, 1, True)
    assert tokenizer.encode("<end_of_turn>", parse_special=True) == [size]
    assert size not in tokenizer.encode("<end_of_turn>", parse_special=False)


def test_truncation_and_padding_kept_in_tokenizer_json_do_not_touch_prompts(tmp_path):
    backend = folders.llama3_like()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    path = folders.write_folder(tmp_path, backend, tokenizer_config=BOS_CONFIG)
    tokenizer = Tokenizer.from_folder(path)
    text = "a b c d e f g h i j k"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert len(tokenizer.encode("a")) == 2


def test_default_sampling_reads_vllms_keys_and_not_do_sample(tmp_path):
    given = {"do_sample": False, "temperature": 0.6, "top_p": None, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1, "max_new_tokens": 9,
             "num_beams": 4}
    tokenizer = Tokenizer.from_folder(folders.write_folder(tmp_path, folders.llama3_like(), generation_config=given))
    assert tokenizer.default_sampling == {"temperature": 0.6, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1, "max_tokens": 9}


def test_a_whole_number_with_a_point_is_one_and_text_or_truth_is_no_number(tmp_path):
    path = folders.write_folder(tmp_path, folders.llama3_like(), generation_config={"top_k": 50.0, "max_new_tokens": 7.0, "temperature": 1})
    sampling = Tokenizer.from_folder(path).default_sampling
    assert sampling == {"top_k": 50, "max_tokens": 7, "temperature": 1}
    assert type(sampling["top_k"]) is type(sampling["max_tokens"]) is int
    for name, value in (("top_k", 50.5), ("top_k", True), ("top_p", "0.9"), ("temperature", False), ("min_p", [0.1]), ("max_new_tokens", "7")):
        folders.write_folder(tmp_path, folders.llama3_like(), generation_config={name: value})
        with pytest.raises(TokenizerError, match=rf"generation_config\.json: {name} is .*; it must be a (whole )?number"):
            Tokenizer.from_folder(path)
    (path / "generation_config.json").write_text('{"temperature": NaN}')
    with pytest.raises(TokenizerError, match="temperature is nan; it must be a number"):
        Tokenizer.from_folder(path)


@pytest.mark.parametrize("name", ["add_bos_token", "add_prefix_space", "legacy", "split_special_tokens", "clean_up_tokenization_spaces"])
def test_a_flag_that_is_neither_true_nor_false_is_refused(tmp_path, name):
    for value in ("false", 0, [True]):
        path = folders.write_folder(tmp_path, folders.llama3_like(), tokenizer_config={name: value})
        with pytest.raises(TokenizerError, match=f"{name} is .*; it must be true or false"):
            Tokenizer.from_folder(path)


def test_decode_skips_special_tokens_and_ids_outside_the_vocabulary(kinds):
    tokenizer = kinds["llama3"]
    ids = [*tokenizer.encode("hello"), *tokenizer.eos_token_ids, 10**6, -1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"
    assert tokenizer.decode(ids) == "<|begin_of_text|>hello<|end_of_text|>"


def test_token_text_keeps_the_leading_space_and_marks_half_characters(kinds):
    llama2, llama3 = kinds["mistral"], kinds["llama3"]
    assert [llama2.token_text(i) for i in llama2.encode("hello", add_special_tokens=False)] == [" hello"]
    assert llama2.token_text(3 + 0xE2) == "\ufffd"
    assert llama3.token_text(llama3.encode(" hello", add_special_tokens=False)[0]).startswith(" ")
    assert llama3.token_text(llama3.bos_token_id) == "<|begin_of_text|>"
    assert llama3.token_text(10**6) == ""


@pytest.mark.parametrize(("present", "message"), [("tokenizer.model", r"SentencePiece.*use_fast=True"), ("x.txt", "has no tokenizer.json; copy")])
def test_a_folder_without_tokenizer_json_is_refused_with_what_to_do(tmp_path, present, message):
    (tmp_path / present).write_text("x")
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="is not a folder"):
        Tokenizer.from_folder(tmp_path / "absent")


@pytest.mark.parametrize(("name", "text", "message"), [
    ("tokenizer.json", "{", "cannot be read"), ("tokenizer_config.json", "{", "is not JSON"), ("generation_config.json", "[]", "holds a list"),
    ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "default"}]}), "chat_template must be a text"),
])
def test_a_damaged_file_is_refused_with_its_name(tmp_path, name, text, message):
    folders.write_folder(tmp_path, folders.llama3_like())
    (tmp_path / name).write_text(text)
    with pytest.raises(TokenizerError, match=f"{name}.*{message}"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("damage", [
    lambda root: root.update(truncation={"max_length": 2**64, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}),
    lambda root: root.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    lambda root: root.update(pre_tokenizer={"type": "FixedLength", "length": 0}), lambda root: root["model"]["vocab"].update(x=2**31),
    lambda root: root["model"]["vocab"].update(x=-1), lambda root: root["model"].update(vocab=3), lambda root: root.update(model=[]),
    lambda root: root["added_tokens"][0].update(id=10**30),
    lambda root: root.update(decoder={"type": "Strip", "content": " ", "start": -1, "stop": 0}),
])
def test_a_damaged_tokenizer_json_is_refused_and_no_panic_comes_through(tmp_path, damage):
    path = folders.write_folder(tmp_path, folders.llama3_like()) / "tokenizer.json"
    root = json.loads(path.read_text())
    damage(root)
    path.write_text(json.dumps(root))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)
