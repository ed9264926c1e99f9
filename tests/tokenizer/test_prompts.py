"""Special-token text in a text prompt is special, in a chat it is text, and ``parse_special`` says otherwise for either."""
import pytest

from tests.tokenizer import tokenizer_folders as folders
from tpllm.engine.prompts import encode_prompt
from tpllm.errors import PromptError
from tpllm.openai_api import read_request
from tpllm.openai_api.api_error import ApiError
from tpllm.tokenizer import Tokenizer
from tpllm.tokenizer.generation_defaults import GenerationDefaults

TEXT = "<|im_start|>user\nhello<|im_end|>\n"
MESSAGES = [{"role": "user", "content": "a<|im_end|>"}]


@pytest.mark.parametrize(("prompt", "num_special"), [
    (TEXT, 2), ({"prompt": TEXT}, 2), ({"prompt": TEXT, "parse_special": False}, 0), ({"prompt": TEXT, "parse_special": True}, 2),
    ({"messages": MESSAGES, "add_generation_prompt": False}, 2), ({"messages": MESSAGES, "add_generation_prompt": False, "parse_special": True}, 3),
])
def test_special_tokens_of_texts_and_chats(kinds, prompt, num_special):
    tokenizer = kinds["chatml"]
    ids = encode_prompt(prompt, tokenizer)["prompt_token_ids"]
    assert sum(token_id in tokenizer.special_ids for token_id in ids) == num_special


def test_split_special_tokens_of_a_folder_is_the_default_of_its_texts(tmp_path):
    tokenizer = Tokenizer.from_folder(folders.write_folder(tmp_path, folders.chatml_like(), tokenizer_config={"split_special_tokens": True}))
    assert not tokenizer.special_ids & set(encode_prompt(TEXT, tokenizer)["prompt_token_ids"])
    assert tokenizer.special_ids & set(encode_prompt({"prompt": TEXT, "parse_special": True}, tokenizer)["prompt_token_ids"])


def test_parse_special_of_an_openai_row_goes_to_its_prompt_and_must_be_true_or_false():
    prompt, = read_request("/v1/completions", {"prompt": TEXT, "parse_special": False}).prompts
    assert prompt == {"prompt": TEXT, "parse_special": False}
    prompt, = read_request("/v1/chat/completions", {"messages": MESSAGES, "parse_special": True}).prompts
    assert prompt["parse_special"] is True
    with pytest.raises(ApiError, match=r"parse_special is .*; it must be true or false"):
        read_request("/v1/completions", {"prompt": TEXT, "parse_special": "no"})
    with pytest.raises(PromptError, match="parse_special is 'no'; it must be true or false"):
        encode_prompt({"prompt": TEXT, "parse_special": "no"}, None)


def test_a_folder_without_tokenizer_files_has_its_ending_ids_and_sampling_all_the_same(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert GenerationDefaults.from_folder(tmp_path) == GenerationDefaults(frozenset({7}), {})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8], "top_k": 50.0}')
    assert GenerationDefaults.from_folder(tmp_path) == GenerationDefaults(frozenset({8}), {"top_k": 50})
