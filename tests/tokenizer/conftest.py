"""Loaded tokenizers of four kinds."""
import pytest

from tests.tokenizer import chat_templates
from tests.tokenizer import tokenizer_folders as folders
from tpllm.tokenizer import Tokenizer

KINDS = {
    "llama3": (folders.llama3_like, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "chat_template": chat_templates.LLAMA3}),
    "mistral": (lambda: folders.sentencepiece_like(prepend_scheme="first"),
                {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": chat_templates.MISTRAL}),
    "mistral_legacy": (lambda: folders.sentencepiece_like(prepend_scheme=None),
                       {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": chat_templates.MISTRAL}),
    "qwen3": (folders.chatml_like,
              {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": chat_templates.QWEN3}),
    "chatml": (folders.chatml_like, {"bos_token": None, "eos_token": "<|im_end|>", "chat_template": chat_templates.CHATML}),
}


@pytest.fixture(scope="session")
def kind_paths(tmp_path_factory):
    """Folder of each kind, by name."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: folders.write_folder(root / name, make(), tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", **settings})
            for name, (make, settings) in KINDS.items()}


@pytest.fixture(scope="session")
def kinds(kind_paths):
    """Loaded tokenizer of each kind, by name."""
    return {name: Tokenizer.from_folder(path) for name, path in kind_paths.items()}
