"""What the tokenizer of a GGUF file is told by its keys, and what is refused. Ids are compared with llama.cpp's elsewhere."""
import pytest

from tests.support.gguf_files import raw_gguf, raw_metadata
from tpllm.checkpoint.gguf.header import open_gguf
from tpllm.errors import TokenizerError, TpllmError
from tpllm.tokenizer.decoder_stages import byte_of_character
from tpllm.tokenizer.gguf import tokenizer_from_gguf

ALPHABET = list(byte_of_character())
TOKENS = [*ALPHABET, "he", "ll", "hell", "Ġhell", "<|begin|>", "<|im_end|>", "<think>", "<|eot_id|>"]
BYTE_LEVEL = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": TOKENS,
              "tokenizer.ggml.token_type": [1] * (len(TOKENS) - 4) + [3, 3, 4, 3], "tokenizer.ggml.merges": ["h e", "l l", "he ll", "Ġ hell"],
              "tokenizer.ggml.bos_token_id": TOKENS.index("<|begin|>"), "tokenizer.ggml.eos_token_id": TOKENS.index("<|im_end|>"),
              "tokenizer.ggml.padding_token_id": ALPHABET.index("!")}
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]
SENTENCEPIECE = {"general.architecture": "llama", "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": PIECES,
                 "tokenizer.ggml.scores": [0.0] * 259 + [-4.0, -5.0, -6.0, -1.0, -2.0],
                 "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 5}


def read(tmp_path, base: dict, without: tuple[str, ...] = (), **more):
    named = {f"tokenizer.{key}" if key.startswith("chat") else f"tokenizer.ggml.{key}": value for key, value in more.items()}
    metadata = {key: value for key, value in {**base, **named}.items() if key.removeprefix("tokenizer.ggml.") not in without}
    (tmp_path / "model.gguf").write_bytes(raw_gguf(raw_metadata(metadata), num_keys=len(metadata)))
    return tokenizer_from_gguf(open_gguf(tmp_path / "model.gguf"))


def pieces(tokenizer, text: str, **how) -> list[str]:
    return [tokenizer.piece(token_id) for token_id in tokenizer.encode(text, **how)]


def test_bos_and_eos_are_added_as_the_file_says(tmp_path):
    assert pieces(read(tmp_path, BYTE_LEVEL), "hell") == ["hell"]
    assert pieces(read(tmp_path, BYTE_LEVEL, add_bos_token=True), "hell") == ["<|begin|>", "hell"]
    both = read(tmp_path, BYTE_LEVEL, add_bos_token=True, add_eos_token=True)
    assert pieces(both, "hell") == ["<|begin|>", "hell", "<|im_end|>"]
    assert pieces(both, "<|begin|>hell", parse_special=True) == ["<|begin|>", "hell", "<|im_end|>"]
    assert pieces(read(tmp_path, BYTE_LEVEL, pre="llama-bpe"), "hell") == ["<|begin|>", "hell"]
    assert pieces(read(tmp_path, SENTENCEPIECE), "ab") == ["<s>", "▁ab"]
    assert pieces(read(tmp_path, SENTENCEPIECE, add_bos_token=False, add_space_prefix=False), "ab") == ["ab"]


def test_of_two_merges_that_overlap_the_one_of_the_higher_score_comes_first(tmp_path):
    tokens, more = [*PIECES[:-2], "c", "ab", "bc"], [0.0] * 259 + [-4.0, -5.0, -6.0, -7.0]
    types = SENTENCEPIECE["tokenizer.ggml.token_type"] + [1]
    for ab, bc, expected in ((-1.0, -2.0, ["<s>", "▁", "ab", "c"]), (-2.0, -1.0, ["<s>", "▁", "a", "bc"])):
        assert pieces(read(tmp_path, SENTENCEPIECE, tokens=tokens, scores=[*more, ab, bc], token_type=types), "abc") == expected


def test_every_token_that_ends_a_turn_is_known(tmp_path):
    tokenizer = read(tmp_path, BYTE_LEVEL)
    assert {tokenizer.piece(token_id) for token_id in tokenizer.eos_token_ids} == {"<|im_end|>", "<|eot_id|>"}
    assert read(tmp_path, SENTENCEPIECE).eos_token_ids == {2}


def test_control_tokens_are_text_unless_asked_for_and_user_defined_ones_never(tmp_path):
    tokenizer = read(tmp_path, BYTE_LEVEL)
    assert "<think>" in pieces(tokenizer, "a<think>hell")
    assert "<|im_end|>" not in pieces(tokenizer, "a<|im_end|>hell", parse_special=False)
    assert "<|im_end|>" in pieces(tokenizer, "a<|im_end|>hell", parse_special=True)
    assert pieces(tokenizer, "!") == ["!"], "a padding token that is a word stays one"
    assert tokenizer.decode(tokenizer.encode("a<think>hell<|im_end|>"), skip_special_tokens=True) == "a<think>hell"


def test_characters_outside_the_vocabulary_are_bytes(tmp_path):
    tokenizer = read(tmp_path, SENTENCEPIECE)
    assert pieces(tokenizer, "é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("aé ab"), skip_special_tokens=True) == "aé ab"


def test_chat_templates_are_read_by_name(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    more = {"chat_template": "{{ messages[0].content }}<|im_end|>", "chat_template.tool_use": "{{ tools | length }}"}
    tokenizer = read(tmp_path, BYTE_LEVEL, **more)
    assert tokenizer.render_chat(messages) == "hi<|im_end|>"
    assert tokenizer.render_chat(messages, tools=[{}, {}]) == "2"


@pytest.mark.parametrize(("base", "more", "message"), [
    (BYTE_LEVEL, {"pre": "other"}, r"tokenizer\.ggml\.pre is 'other'; it must be one of llama-bpe.*tokenizer\.json"),
    (BYTE_LEVEL, {"model": "bert"}, r"tokenizer\.ggml\.model is 'bert'; it must be one of gpt2, llama"),
    (BYTE_LEVEL, {"tokens": [1, 2]}, r"tokenizer\.ggml\.tokens is .*a list of texts"),
    (BYTE_LEVEL, {"token_type": [1, 1]}, r"tokenizer\.ggml\.token_type is .*264 whole numbers"),
    (BYTE_LEVEL, {"merges": ["h e", "h hell"]}, r"tokenizer\.ggml\.merges is 'h hell'; it must be two tokens"),
    (BYTE_LEVEL, {"merges": ["he"]}, r"tokenizer\.ggml\.merges is 'he'"),
    (SENTENCEPIECE, {"scores": [0.0]}, r"tokenizer\.ggml\.scores is .*264 finite numbers"),
    (SENTENCEPIECE, {"scores": [float("nan")] * 264}, r"tokenizer\.ggml\.scores"),
    (BYTE_LEVEL, {"bos_token_id": "x"}, r"tokenizer\.ggml\.bos_token_id is 'x'; it must be int"),
])
def test_what_cannot_be_read_is_refused_by_its_key(tmp_path, base, more, message):
    with pytest.raises(TpllmError, match=message):
        read(tmp_path, base, **more)


@pytest.mark.parametrize("key", ["model", "tokens", "merges"])
def test_a_missing_key_is_named(tmp_path, key):
    with pytest.raises(TokenizerError, match=rf"tokenizer\.ggml\.{key} is missing"):
        read(tmp_path, BYTE_LEVEL, without=(key,))


def test_a_token_of_absurd_length_is_refused_before_it_is_cut(tmp_path):
    with pytest.raises(TokenizerError, match=r"the longest 100000; the limits are"):
        read(tmp_path, SENTENCEPIECE, tokens=[*PIECES[:-1], "a" * 100_000])
