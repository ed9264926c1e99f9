"""The tokenizer that a GGUF file holds (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "Tokenizer"), cut as llama.cpp cuts."""
import dataclasses
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from tpllm.checkpoint.gguf.header import GgufFile
from tpllm.errors import TokenizerError, log, short
from tpllm.tokenizer.backend import border
from tpllm.tokenizer.folder import DEFAULT_TEMPLATE, TokenizerFolder
from tpllm.tokenizer.generation_defaults import GenerationDefaults
from tpllm.tokenizer.pre_tokenizers import WORD_RULES
from tpllm.tokenizer.token_files import MAX_ID, TokenFiles
from tpllm.tokenizer.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, _UNUSED, BYTE = range(1, 7)
NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "seperator": "sep_token", "padding": "pad_token", "mask": "mask_token"}
"""Keys ``tokenizer.ggml.*_token_id`` (the format spells it so), and Hugging Face's names."""
ENDING_IDS = ("eos", "eot", "eom")
ENDING_TEXTS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "<|end_of_text|>",
                "<|end_of_turn|>")
"""Control tokens that end a turn wherever they are there, as files often name only one of several."""
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
"""Where a file does not name them."""
UNSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")
SPACE, MAX_SPLITS = "\u2581", 20_000_000


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Tokens with their kinds.

    Attributes:
        gguf: the file.
        texts: of each id.
        kinds: of each id: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
        ids: text -> id.
    """

    gguf: GgufFile
    texts: Sequence[str]
    kinds: np.ndarray
    ids: dict[str, int]

    @property
    def model(self) -> str:
        """``"gpt2"`` or ``"llama"``."""
        return self.gguf.get("tokenizer.ggml.model", str, "")

    def token_id(self, name: str) -> int | None:
        """``tokenizer.ggml.<name>_token_id`` where it is in the vocabulary."""
        default = SENTENCEPIECE_IDS.get(name) if self.model == "llama" else None
        token_id = self.gguf.get(f"tokenizer.ggml.{name}_token_id", int, default)
        return token_id if token_id is not None and 0 <= token_id < len(self.texts) else None


def tokenizer_from_gguf(gguf: GgufFile) -> Tokenizer:
    """The tokenizer of a GGUF file: byte-level BPE (``gpt2``) or SentencePiece's BPE (``llama``).

    A user-defined token is one wherever its text stands; the text of a control token is text like any other unless ``parse_special`` is set.

    Raises:
        TokenizerError: no tokenizer, a kind that is not read, or one that is damaged; it names the key.
        CheckpointError: a key of the wrong type.
    """
    vocabulary = _read_vocabulary(gguf)
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if vocabulary.model not in makers:
        raise _refused(gguf, "model", vocabulary.model or None, f"one of {', '.join(makers)}; give a folder with the model's tokenizer.json")
    with border(f"{gguf.path}: its tokenizer cannot be built", fix="convert the model again"):
        backend, adds_bos = makers[vocabulary.model](vocabulary)
        _add_tokens(backend, vocabulary)
        _add_eos(backend, vocabulary)
        return Tokenizer(backend, _settings(vocabulary, adds_bos=adds_bos))


def defaults_from_gguf(gguf: GgufFile) -> GenerationDefaults:
    """The ids that end a text by a file whose tokenizer is not read."""
    ids = (gguf.get(f"tokenizer.ggml.{name}_token_id", int) for name in ENDING_IDS)
    return GenerationDefaults(frozenset(token_id for token_id in ids if token_id is not None and 0 <= token_id <= MAX_ID))


def _read_vocabulary(gguf: GgufFile) -> Vocabulary:
    texts = _texts(gguf, "tokens")
    kinds = gguf.get("tokenizer.ggml.token_type", np.ndarray)
    kinds = np.full(len(texts), NORMAL) if kinds is None else kinds
    if len(kinds) != len(texts) or kinds.dtype.kind not in "iu":
        raise _refused(gguf, "token_type", kinds, f"{len(texts)} whole numbers, one for each token")
    ids = {text: token_id for token_id, text in enumerate(texts)}
    if len(ids) < len(texts):
        log.warning("%s: %d of %d tokens have the text of another one; the last of each is used", gguf.path, len(texts) - len(ids), len(texts))
    return Vocabulary(gguf, texts, kinds, ids)


def _texts(gguf: GgufFile, name: str) -> tuple[str, ...]:
    texts = gguf.get(f"tokenizer.ggml.{name}", (tuple, np.ndarray))
    if not isinstance(texts, tuple) or not texts or not isinstance(texts[0], str):
        raise _refused(gguf, name, texts, "a list of texts. The file holds no tokenizer")
    return texts


def _byte_level(vocabulary: Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """(the tokenizer, whether it adds BOS where the file does not say)."""
    gguf, merges = vocabulary.gguf, []
    pre = gguf.get("tokenizer.ggml.pre", str, "default")
    if pre not in WORD_RULES:
        raise _refused(gguf, "pre", pre, f"one of {', '.join(WORD_RULES)}; give a folder with the model's tokenizer.json")
    rule = WORD_RULES[pre]
    for merge in _texts(gguf, "merges"):
        first, _, second = merge[1:].partition(" ")
        merges.append((merge[:1] + first, second))
        if not (merges[-1][0] in vocabulary.ids and second in vocabulary.ids and merges[-1][0] + second in vocabulary.ids):
            raise _refused(gguf, "merges", merge, "two tokens that make a third, with a space between them")
    backend = tokenizers.Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=rule.takes_whole_words))
    backend.pre_tokenizer, backend.decoder = rule.pre_tokenizer(), decoders.ByteLevel()
    return backend, rule.adds_bos


def _sentencepiece(vocabulary: Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """As :func:`_byte_level`; llama.cpp puts a space before every stretch of text, so also behind a token of its own."""
    unknown = vocabulary.token_id("unknown")
    has_bytes = "<0x00>" in vocabulary.ids
    backend = tokenizers.Tokenizer(models.BPE(vocabulary.ids, _merges_by_score(vocabulary), byte_fallback=has_bytes, fuse_unk=True,
                                              unk_token=None if unknown is None else vocabulary.texts[unknown]))
    spaces = normalizers.Replace(" ", SPACE)
    adds_space = vocabulary.gguf.get("tokenizer.ggml.add_space_prefix", bool, True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if adds_space else spaces
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                         *([decoders.Strip(" ", 1, 0)] if adds_space else [])])
    return backend, True


def _merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a third, by the third's score: SentencePiece joins the pair whose token has the highest one first
    (Kudo & Richardson 2018, arXiv:1808.06226)."""
    gguf, ids = vocabulary.gguf, vocabulary.ids
    scores = gguf.get("tokenizer.ggml.scores", np.ndarray)
    if scores is None or len(scores) != len(vocabulary.texts) or scores.dtype.kind != "f" or not np.isfinite(scores).all():
        raise _refused(gguf, "scores", scores, f"{len(vocabulary.texts)} finite numbers, one for each token")
    joined = [ids[vocabulary.texts[i]] for i in np.flatnonzero(~np.isin(vocabulary.kinds, (UNKNOWN, CONTROL, BYTE)))]
    num_splits = sum(len(vocabulary.texts[token_id]) for token_id in joined)
    longest = max((len(vocabulary.texts[token_id]) for token_id in joined), default=0)
    if num_splits > MAX_SPLITS or longest > 2**12:
        raise TokenizerError(f"{gguf.path}: tokenizer.ggml.tokens have {num_splits} characters, the longest {longest}; the limits are {MAX_SPLITS} "
                             f"and {2**12}. It is damaged")
    merges = []
    for token_id in dict.fromkeys(joined):
        text, score = vocabulary.texts[token_id], -float(scores[token_id])
        for cut in range(1, len(text)):
            first, second = text[:cut], text[cut:]
            if first in ids and second in ids:
                merges.append((score, len(first), first, second))
    merges.sort(key=lambda merge: merge[:2])
    return [(first, second) for _, _, first, second in merges]


def _add_tokens(backend: tokenizers.Tokenizer, vocabulary: Vocabulary) -> None:
    """Tokens that are found in a text before it is cut."""
    special = {token_id for name in ("bos", *ENDING_IDS) if (token_id := vocabulary.token_id(name)) is not None}
    is_phi3 = vocabulary.gguf.arch == "phi3" and vocabulary.model == "llama"
    found = dict.fromkeys(np.flatnonzero(np.isin(vocabulary.kinds, (UNKNOWN, CONTROL, USER_DEFINED))).tolist() + sorted(special))
    tokens = []
    for token_id in found:
        text, is_special = vocabulary.texts[token_id], token_id in special or vocabulary.kinds[token_id] != USER_DEFINED
        if text and vocabulary.ids[text] == token_id:
            # Phi-3's own tokenizer takes the spaces behind its tokens; GGUF has no place to say so.
            is_stripping = is_phi3 and is_special and text not in UNSTRIPPED
            tokens.append(tokenizers.AddedToken(text, normalized=False, special=is_special, rstrip=is_stripping))
    backend.add_special_tokens([token for token in tokens if token.special])
    backend.add_tokens([token for token in tokens if not token.special])


def _add_eos(backend: tokenizers.Tokenizer, vocabulary: Vocabulary) -> None:
    eos = vocabulary.token_id("eos")
    if vocabulary.gguf.get("tokenizer.ggml.add_eos_token", bool, False) and eos is not None:
        text = vocabulary.texts[eos]
        backend.post_processor = processors.TemplateProcessing(single=["$A", text], special_tokens=[(text, eos)])


def _settings(vocabulary: Vocabulary, *, adds_bos: bool) -> TokenizerFolder:
    """What a Hugging Face folder would say beside tokenizer.json."""
    gguf = vocabulary.gguf
    settings = {"add_bos_token": gguf.get("tokenizer.ggml.add_bos_token", bool, adds_bos)}
    named: dict = {}
    for name, theirs in NAMED.items():
        token_id = vocabulary.token_id(name)
        # A padding token may be any word; only tokens of their own are taken out of the text.
        if token_id is not None and vocabulary.texts[token_id] and (name in ("bos", "eos") or vocabulary.kinds[token_id] in (UNKNOWN, CONTROL)):
            named[theirs] = vocabulary.texts[token_id]
    endings = [token_id for name in ENDING_IDS if (token_id := vocabulary.token_id(name)) is not None]
    endings += [token_id for text in ENDING_TEXTS if (token_id := vocabulary.ids.get(text)) is not None and vocabulary.kinds[token_id] == CONTROL]
    return TokenizerFolder(path=gguf.path, settings=settings, config={"eos_token_id": list(dict.fromkeys(endings))}, generation_config={},
                           templates=_templates(gguf), tokens=TokenFiles(named))


def _templates(gguf: GgufFile) -> dict[str, str]:
    found = {key.removeprefix("tokenizer.chat_template."): gguf.get(key, str) for key in gguf.metadata if key.startswith("tokenizer.chat_template.")}
    if (default := gguf.get("tokenizer.chat_template", str)) is not None:
        found[DEFAULT_TEMPLATE] = default
    return found


def _refused(gguf: GgufFile, name: str, value: object, wanted: str) -> TokenizerError:
    found = "missing" if value is None else short(value)
    return TokenizerError(f"{gguf.path}: tokenizer.ggml.{name} is {found}; it must be {wanted}")
