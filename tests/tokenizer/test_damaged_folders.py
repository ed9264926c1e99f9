"""Damage that tests/checkpoint/test_mutations.py found, each as its own case."""
import json

import pytest

from tests.support.damaged_tokenizers import MESSAGES, files, use
from tpllm.errors import TokenizerError
from tpllm.tokenizer import Tokenizer


def folder_of(path, family, **changes):
    """The folder of a family whose tokenizer_config.json has other values."""
    for name, content in files(family).items():
        (path / f"{name}.json").write_bytes(content)
    settings = json.loads(files(family)["tokenizer_config"]) | changes
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("name", [{"a": 1}, [], None, 3])
def test_a_template_under_a_name_that_is_no_text_is_refused(tmp_path, name):
    with pytest.raises(TokenizerError, match="chat_template must be a text or a list of"):
        use(folder_of(tmp_path, "qwen2", chat_template=[{"name": name, "template": "{{ messages }}"}]))


def test_what_the_library_would_panic_at_is_refused_before_it_reads_it(tmp_path, capfd):
    lost = json.loads(files("phi3")["tokenizer"])
    template = lost["post_processor"]["processors"][1]
    template["special_tokens"] = {"<s>": next(iter(template["special_tokens"].values()))}
    short = json.loads(files("llama")["tokenizer"])
    short["model"]["continuing_subword_prefix"] = "####"
    for family, root, message in (("phi3", lost, "names a special token that special_tokens does not"), ("llama", short, "is shorter than")):
        (folder_of(tmp_path, family) / "tokenizer.json").write_text(json.dumps(root))
        with pytest.raises(TokenizerError, match=message):
            use(tmp_path)
    assert "panicked" not in capfd.readouterr().err


def test_a_post_processor_that_names_the_text_twice_leaves_chats_as_they_are(tmp_path):
    root = json.loads(files("llama")["tokenizer"])
    expected = Tokenizer.from_folder(folder_of(tmp_path, "llama")).encode_chat(MESSAGES)
    root["post_processor"]["single"] *= 2
    (tmp_path / "tokenizer.json").write_text(json.dumps(root))
    ids = Tokenizer.from_folder(tmp_path).encode_chat(MESSAGES)
    assert [token for token in ids if token in expected] == ids
    assert len(ids) >= len(expected)
