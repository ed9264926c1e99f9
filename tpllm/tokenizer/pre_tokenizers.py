"""How byte-level BPE cuts a text into words first, by the name that a GGUF file gives it (``tokenizer.ggml.pre``).

The patterns are those of the models' own tokenizer.json files; where several are given, each cuts what the one before left.
"""
import dataclasses

import tokenizers
from tokenizers import pre_tokenizers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3, QWEN2 = _LLAMA3 % r"\p{N}{1,3}", _LLAMA3 % r"\p{N}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|"
          r"%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEKKEN = _CASED % ("", "", r"\p{N}")
GPT4O = _CASED % (*["(?i:'s|'t|'re|'ve|'m|'ll|'d)?"] * 2, r"\p{N}{1,3}")
DEEPSEEK3 = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
             r"\s*[\r\n]+|\s+(?!\S)|\s+")
HAN_HANGUL, HAN_KANA = "[\u4E00-\u9FA5\u0800-\u4E00\uAC00-\uD7FF]+", "[\u4E00-\u9FA5\u3040-\u309F\u30A0-\u30FF]+"


@dataclasses.dataclass(frozen=True)
class WordRule:
    """One way to cut words.

    Attributes:
        patterns: regular expressions of Oniguruma; each cuts out what matches it.
        takes_whole_words: whether a word that is in the vocabulary is one token, whatever the merges say.
        adds_bos: where the file does not say.
    """

    patterns: tuple[str, ...]
    takes_whole_words: bool = False
    adds_bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """The rule, and bytes as characters behind it."""
        splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_RULES = {
    WordRule((LLAMA3,), takes_whole_words=True, adds_bos=True): ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0",
                                                                 "lfm2"),
    WordRule((LLAMA3,)): ("dbrx", "smaug-bpe"),
    WordRule((QWEN2,)): ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"),
    WordRule((GPT2,)): ("gpt-2", "phi-2", "mpt", "olmo", "jais"),
    WordRule((r"\p{N}", GPT2)): ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"),
    WordRule((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")): ("default",),
    WordRule((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")): ("falcon",),
    WordRule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN_HANGUL, r"\p{N}")): ("deepseek-coder",),
    WordRule((r"\p{N}{1,3}", HAN_KANA, DEEPSEEK3)): ("deepseek-v3",),
    WordRule((TEKKEN,), takes_whole_words=True, adds_bos=True): ("tekken",),
    WordRule((GPT4O,)): ("gpt-4o", "llama4"),
}
WORD_RULES: dict[str, WordRule] = {name: rule for rule, names in _RULES.items() for name in names}
"""The rule of each ``tokenizer.ggml.pre``."""
