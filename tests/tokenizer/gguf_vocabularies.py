# ruff: noqa: RUF001  (the texts are odd on purpose)
"""Texts, and vocabularies trained here on a few of them, as GGUF metadata."""
import functools
import json
import pathlib
import random

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

import tpllm
from tpllm.tokenizer.pre_tokenizers import WORD_RULES

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HARD = [
    "Übergröße naïve café — 你好，世界！ こんにちは 안녕하세요 🙂🙃👩\u200d👩\u200d👧 ١٢٣ 12345 ½ ²", "don't WE'LL he's I'M they'Ve",
    "Привет, мир! Ελληνικά עברית العربية हिन्दी ไทย", "x = y[1:2]  # 한국어 \r\n\r\n\tfoo", "\u3000全角　空白。、「」‘quotes’ “x”",
    "a\u0301e\u0300 \u200b zero\u00a0nbsp", "$100.50 + 3^2 <= `x` ~ |y|", "   lead and trail   ", "\n\n\n  \n x\n", "ǅ ǈ ÀÉÎ ﬁ Ⅷ 𝐀𝐁 𐐀",
    "ab12cd3456789", "HelloWorld fooBar HTTPServer", "....!!!??? ---- ==== ____", "<|im_start|>user\nhi<|im_end|>", "<think> x </think>", " ", ""]
CHARACTERS = "aZ é1٣ \n\r\t.,'-世한🙂ßǅ\u00a0\u3000$<|>sdt"


@functools.cache
def corpus() -> tuple[str, ...]:
    """Python of this package, and :data:`HARD`."""
    files = sorted(pathlib.Path(tpllm.__file__).parent.glob("*/*.py"))[:40]
    return (*(text for file in files if len(text := file.read_text("utf-8")) > 200), *HARD * 20)


@functools.cache
def texts(*, has_marks: bool = True) -> tuple[str, ...]:
    """Some 400, of code, of :data:`HARD` and of random characters."""
    rng, found = random.Random(0), list(HARD)
    files = [text for text in corpus() if len(text) > 200]
    for _ in range(150):
        text = rng.choice(files)
        start = rng.randrange(len(text))
        found.append(text[start:start + rng.randrange(1, 120)])
    characters = CHARACTERS + ("\u0301" if has_marks else "")
    found += ["".join(rng.choices(characters, k=rng.randrange(1, 40))) for _ in range(250)]
    return tuple(found)


@functools.cache
def byte_level(pre: str) -> dict:
    """The tokenizer.json of byte-level BPE with a file's word rule; ``<think>`` is user-defined."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = WORD_RULES[pre].pre_tokenizer()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=1200, show_progress=False, initial_alphabet=alphabet))
    backend.add_special_tokens(list(SPECIALS))
    backend.add_tokens(["<think>"])
    return json.loads(backend.to_str())


@functools.cache
def sentencepiece() -> tuple[tuple[str, float, int], ...]:
    """(text, score, kind) of each token; some characters of the texts are only there as bytes."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=1500, show_progress=False, special_tokens=["<unk>"]))
    model = json.loads(backend.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)[1:]
    characters, merged = words[:len(words) - len(model["merges"])], words[len(words) - len(model["merges"]):]
    left_out = set(sorted(set(characters) - {"▁"})[::7])
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256))]
    pieces += [(text, -float(rank), 1) for rank, text in enumerate(merged) if not left_out & set(text)]
    pieces += [(text, -float(len(merged) + rank), 1) for rank, text in enumerate(characters) if text not in left_out]
    pieces += [("▁▁", -1e5, 1), ("▁▁▁▁", -1.1e5, 1), ("▁▁▁▁▁▁▁▁", -1.2e5, 1), ("<think>", -1000.0, 4), ("<|end|>", -1000.0, 3)]
    return tuple({piece[0]: piece for piece in reversed(pieces)}.values())[::-1]
