"""The same ids and texts as transformers gives for the same folder."""
import pytest

NASTY = ["", " ", "  hello", "hello  ", "\n\n\t", "\r\n", "a\x00b", "hello<|im_end|>x", "</s>", "<s>hello", "<unk>", "<think>x</think>",
         "é e\u0301 \u200b\ufeff", "日本語 😀👩‍👩‍👧", "\u2581hello", "<0xE2>", "def f(x):\n\treturn x  # hm", "a" * 300, "1234567", "'s 'LL",
         "\U0010ffff", "[INST] hello [/INST]"]
TURNS = [{"role": "user", "content": "hello "}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n yes "},
         {"role": "user", "content": " lo"}]
KINDS = ["llama3", "mistral", "mistral_legacy", "qwen3", "chatml"]
pytestmark = pytest.mark.oracle


@pytest.fixture
def theirs(kind_paths):
    transformers = pytest.importorskip("transformers")
    return lambda kind: transformers.PreTrainedTokenizerFast.from_pretrained(str(kind_paths[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_nasty_strings_get_the_same_ids_and_texts(kinds, theirs, kind):
    ours, oracle = kinds[kind], theirs(kind)
    for text in NASTY:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == oracle.encode(text, add_special_tokens=False), text
        assert ours.encode(text, parse_special=False) == oracle.encode(text, split_special_tokens=True), text
        for skips in (True, False):
            assert ours.decode(ids, skip_special_tokens=skips) == oracle.decode(ids, skip_special_tokens=skips), text
    flagged = {token_id for token_id, token in oracle.added_tokens_decoder.items() if token.special}
    assert ours.special_ids == flagged | set(oracle.all_special_ids)
    assert (ours.bos_token_id, ours.pad_token_id, ours.eos_token_ids) == (oracle.bos_token_id, oracle.pad_token_id, {oracle.eos_token_id})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_turns", [1, 2, 3])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chats_get_the_same_text_and_ids(kinds, theirs, kind, num_turns, add_generation_prompt):
    ours, oracle, options = kinds[kind], theirs(kind), {"add_generation_prompt": add_generation_prompt}
    messages = TURNS[:num_turns]
    assert ours.render_chat(messages, **options) == oracle.apply_chat_template(messages, tokenize=False, **options)
    assert ours.encode_chat(messages, **options) == oracle.apply_chat_template(messages, return_dict=False, **options)


def test_tools_and_template_kwargs_reach_the_template_alike(kinds, theirs):
    tools = [{"type": "function", "function": {"name": "f<b>", "description": "é", "parameters": {"type": "object", "properties": {}}}}]
    assert kinds["llama3"].render_chat(TURNS, tools=tools) == theirs("llama3").apply_chat_template(
        TURNS, tools=tools, tokenize=False, add_generation_prompt=True)
    assert kinds["qwen3"].render_chat(TURNS, template_kwargs={"enable_thinking": False}) == theirs("qwen3").apply_chat_template(
        TURNS, enable_thinking=False, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("kind", KINDS)
def test_special_text_in_messages_leaves_the_special_ids_that_transformers_leaves_in_sanitized_input(kinds, theirs, kind):
    ours, oracle = kinds[kind], theirs(kind)
    special = ours.piece(min(ours.eos_token_ids))
    messages = [{"role": "user", "content": f"hello {special} lo"}]
    sanitized = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True)
    mine = ours.encode_chat(messages)
    keep = [token_id for token_id in mine if token_id in ours.special_ids]
    assert keep == [token_id for token_id in sanitized if token_id in ours.special_ids]
    without_spaces = [oracle.decode(ids, skip_special_tokens=False).replace(" ", "") for ids in (mine, sanitized)]
    assert without_spaces[0] == without_spaces[1] == ours.render_chat(messages).replace(" ", "")
