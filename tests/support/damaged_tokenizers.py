"""Tokenizers of six families whose tokenizer.json, tokenizer_config.json or generation_config.json is damaged, and everything that is done with
such a folder. Functions of a module of its own, so that a process of its own can call them."""
import functools
import json
import pathlib
from collections.abc import Callable, Iterator

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tests.support.mutations import mutation
from tests.tokenizer.chat_templates import CHATML, LLAMA3, MISTRAL, QWEN3
from tests.tokenizer.tokenizer_folders import chatml_like, llama3_like, plain_words, sentencepiece_like
from tpllm.engine.sampling_params import SamplingParams
from tpllm.tokenizer import Tokenizer
from tpllm.tokenizer.detokenizer import Detokenizer
from tpllm.tokenizer.generation_defaults import GenerationDefaults

KINDS = ("tokenizer", "tokenizer_config", "generation_config")
TEXTS = ("hello hello, [INST] 12 \u00e9\U0001f600", "<s></s> <|im_start|> playing \u2581a\n\n x")
MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "lo"}, {"role": "user", "content": "<think>x</think>"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.5, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1,
              "max_new_tokens": 100, "do_sample": True, "transformers_version": "5.0.0"}
MOST_EACH = 1_000_000
"""Numbers of mutations that a family has to itself."""
Case = tuple[str, bytes]


def unigram_like() -> tokenizers.Tokenizer:
    """T5's and Gemma's kind of normalizer and pieces with scores."""
    pieces = [("<unk>", 0.0), ("<s>", -1.0), ("</s>", -1.0), *((piece, -2.0 - len(piece)) for piece in "\u2581 h e l o a \u2581hello lo".split())]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(tokenizers.Regex(" {2,}"), " "), normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace("\u2581", "always"), pre_tokenizers.Digits(individual_digits=True)])
    tokenizer.decoder = decoders.Metaspace("\u2581", "always")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def _settings(kind: str, bos: str | None, eos: str, template: object, **more) -> dict:
    """A tokenizer_config.json; ``None`` stands for a token that there is not."""
    return {"tokenizer_class": kind, "bos_token": bos, "eos_token": {"content": eos, "lstrip": False, "special": True}, "unk_token": "<unk>",
            "add_bos_token": True, "add_prefix_space": None, "clean_up_tokenization_spaces": False, "model_max_length": 4096,
            "chat_template": template, **more}


FAMILIES: dict[str, Callable[[], tuple[tokenizers.Tokenizer, dict]]] = {
    "llama": lambda: (sentencepiece_like(prepend_scheme="first"), _settings("LlamaTokenizer", "<s>", "</s>", MISTRAL, legacy=False)),
    "mistral": lambda: (sentencepiece_like(prepend_scheme=None), _settings("LlamaTokenizer", "<s>", "</s>", MISTRAL, add_prefix_space=True)),
    "qwen2": lambda: (chatml_like(), _settings("Qwen2Tokenizer", None, "<|im_end|>", [
        {"name": "default", "template": CHATML}, {"name": "tool_use", "template": QWEN3}], errors="replace", split_special_tokens=False,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"])),
    "gemma3": lambda: (unigram_like(), _settings("GemmaTokenizer", "<s>", "</s>", CHATML, extra_special_tokens={"image_token": "<image>"})),
    "phi3": lambda: (llama3_like(), _settings("PreTrainedTokenizerFast", "<|begin_of_text|>", "<|eot_id|>", LLAMA3, added_tokens_decoder={
        "400": {"content": "<|extra|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}})),
    "mixtral": lambda: (plain_words(decoders.WordPiece()), _settings("BertTokenizer", None, "[SEP]", CHATML, clean_up_tokenization_spaces=True)),
}


@functools.cache
def files(family: str) -> dict[str, bytes]:
    """The folder's files by their names without the ending."""
    tokenizer, settings = FAMILIES[family]()
    return {"tokenizer": tokenizer.to_str().encode(), "tokenizer_config": json.dumps(settings).encode(), "config": b'{"eos_token_id": 2}',
            "generation_config": json.dumps(GENERATION).encode()}


def cases(kind: str, num_each: int, *, first: int = 0) -> Iterator[Case]:
    """``num_each`` damaged files of each family; a label begins with the family's name."""
    for number, family in enumerate(FAMILIES):
        for seed in range(number * MOST_EACH + first, number * MOST_EACH + first + num_each):
            label, data = mutation(files(family)[kind], seed)
            yield f"{family} {label}", family.encode().ljust(16) + data


def whole(kind: str) -> Iterator[Case]:
    """The files before they are damaged."""
    for family in FAMILIES:
        yield f"{family} whole", family.encode().ljust(16) + files(family)[kind]


def loader(kind: str, folder: pathlib.Path) -> Callable[[bytes], None]:
    """What loads one case in ``folder``."""
    return functools.partial(_load, kind, folder)


def _load(kind: str, folder: pathlib.Path, case: bytes) -> None:
    family, data = case[:16].decode().strip(), case[16:]
    path = folder / kind / family
    if not path.exists():
        path.mkdir(parents=True)
        for name, content in files(family).items():
            (path / f"{name}.json").write_bytes(content)
    (path / f"{kind}.json").write_bytes(data)
    use(path, has_tokenizer=kind != "generation_config")


def use(path: pathlib.Path, *, has_tokenizer: bool = True) -> None:
    """Everything that becomes of a tokenizer's files: ids of texts and chats, and texts of ids, whole and as they grow."""
    SamplingParams(**GenerationDefaults.from_folder(path).sampling)
    if not has_tokenizer:
        return
    tokenizer = Tokenizer.from_folder(path)
    for text in TEXTS:
        ids = tokenizer.encode(text, parse_special=True)
        tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=False)
        grown = Detokenizer(tokenizer)
        for token_id in ids:
            grown.push([token_id])
        grown.finish()
    tokenizer.token_text(5)
    tokenizer.encode_chat(MESSAGES)
    tokenizer.encode_chat([{"role": "user", "content": "hello </s>"}], tools=TOOLS, parse_special=True)
