"""Small tokenizers of the kinds that models have, written as Hugging Face folders."""
import json
import pathlib

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["def parse(text): return text.strip()", "the user said hello, and hello again to the assistant", "für naïve 日本 emoji 😀 tests 123"] * 3


def byte_level_bpe() -> tokenizers.Tokenizer:
    """GPT-2's kind, without any special token."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def llama3_like() -> tokenizers.Tokenizer:
    """Special tokens after the vocabulary; the post-processor adds BOS."""
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens(LLAMA3_SPECIALS)
    bos = LLAMA3_SPECIALS[0]
    template = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def chatml_like() -> tokenizers.Tokenizer:
    """Qwen's kind: no BOS; thinking tags are tokens of their own but not special."""
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens(CHATML_SPECIALS)
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def sentencepiece_like(*, prepend_scheme: str | None) -> tokenizers.Tokenizer:
    """Llama 2's kind with byte fallback; no scheme is the older form that puts a space before every stretch of text."""
    words = ["▁", "<", ">", "s", "/", "h", "e", "l", "o", "[", "]", "I", "N", "S", "T", "a", "u", "r", ":", "▁h", "el", "▁hel", "▁hello", "lo"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("▁", "h"), ("e", "l"), ("▁h", "el"), ("l", "o"), ("▁hel", "lo")]
    tokenizer = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges,
                                                unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prepend_scheme is None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def plain_words(decoder: decoders.Decoder | None) -> tokenizers.Tokenizer:
    """A vocabulary of odd pieces under any decoder."""
    pieces = ["[UNK]", "[SEP]", "play", "##ing", "##s", ".", "n't", "▁a", "▁▁", "b▁", "er</w>", "lo", "|", "é", " .", "a", "<0xE2>", "<0x82>",
              "<0xAC>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[UNK]", "[SEP]"])
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


def write_folder(path: pathlib.Path, tokenizer: tokenizers.Tokenizer, **files: dict) -> pathlib.Path:
    """The tokenizer and JSON files by name: ``write_folder(path, tokenizer, tokenizer_config={...})``."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    for name, values in files.items():
        (path / f"{name}.json").write_text(json.dumps(values))
    return path
