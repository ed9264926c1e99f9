"""tokenizer.json, checked before the tokenizers library reads it, with what tokenizer_config.json's explicit flags change in it.

The library is written in Rust, where a damaged file can end in a panic, which is no ``Exception``, or in a table of as many entries as the largest
id. So its JSON is read here first. The flags act as in transformers 5.24: there only some classes let them, and those that add BOS or EOS do not act
on a tokenizer.json.
"""
import base64
import json
from collections.abc import Iterator, Mapping

from tpllm.errors import TokenizerError, short
from tpllm.tokenizer.folder import TokenizerFolder, read_text
from tpllm.tokenizer.token_files import MAX_ID

MAX_DEPTH = 60  # half of what the library takes
MAX_GAP = 2**20
"""Ids that no token has, below the largest."""
COUNTS = ("start", "stop", "length", "max_length", "stride", "pad_to_multiple_of", "max_input_chars_per_word", "unk_id", "pad_id", "type_id", "id")
SPACE = "\u2581"
BYTE_LEVEL_CLASSES = ("CohereTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer", "Qwen3_5Tokenizer")
METASPACE_CLASSES = ("CodeLlamaTokenizer", "LlamaTokenizer")
"""Classes whose ``add_prefix_space`` acts on a tokenizer.json in transformers; elsewhere it is only kept."""
GENERIC_TYPES = frozenset(("ernie4_5 ernie4_5_moe flex_olmo glm glm4 glm4_moe gpt_bigcode granite granitemoe granitemoehybrid internlm2 internlm3 "
                           "ministral ministral3 mistral mistral3 mixtral nemotron olmo2 olmo3 persimmon phi3 phimoe stablelm").split())
"""Model types whose tokenizer is what tokenizer.json says, whatever class tokenizer_config.json names."""
_TYPES_OF_CLASS = {"CohereTokenizer": "cohere cohere2", "GPT2Tokenizer": "gpt2 gpt_neo gptj opt phi starcoder2",
                   "GPTNeoXTokenizer": "falcon_mamba gpt_neox mamba olmo olmoe", "Qwen2Tokenizer": "qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next",
                   "Qwen3_5Tokenizer": "qwen3_5_text"}
TYPE_CLASSES = {model_type: name for name, model_types in _TYPES_OF_CLASS.items() for model_type in model_types.split()}
"""Classes of model types where tokenizer_config.json names none."""
FIRM_TYPES = ("qwen2",)
"""Model types whose class goes before the one that tokenizer_config.json names."""


def read_tokenizer_json(folder: TokenizerFolder) -> str:
    """The text of tokenizer.json as the library is to read it.

    Raises:
        TokenizerError: it is damaged.
    """
    path, text = folder.path / "tokenizer.json", read_text(folder.path, "tokenizer.json") or ""
    try:
        root = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} cannot be read: it is not JSON ({short(str(error))}); fetch the file again") from None
    if not isinstance(root, dict) or not isinstance(root.get("model"), dict):
        raise TokenizerError(f"{path} cannot be read: it holds no tokenizer's model; fetch the file again")
    wrong = next(_faults(root), None)
    if wrong is not None:
        raise TokenizerError(f"{path} cannot be read: {wrong}; fetch the file again")
    return json.dumps(root, ensure_ascii=False) if _apply_flags(root, folder) else text


def _faults(root: Mapping) -> Iterator[str]:
    """What the library would panic at, or take without end."""
    vocabulary = root["model"].get("vocab")
    if isinstance(vocabulary, Mapping) and vocabulary:
        if not all(type(token_id) is int for token_id in vocabulary.values()):
            yield "a token's id is no whole number"
        largest = max(vocabulary.values())
        if min(vocabulary.values()) < 0 or largest > len(vocabulary) + MAX_GAP:
            yield f"its vocabulary has {len(vocabulary)} tokens, with an id of {short(largest)}"
    if _has_short_piece(root["model"]):
        yield "a piece that its merges continue a word with is shorter than continuing_subword_prefix"
    stack = [(part, 1) for name, part in root.items() if name != "model"]
    stack += [(part, 1) for name, part in root["model"].items() if name not in ("vocab", "merges")]
    stack += [(value, 1) for value in [{name: value} for name, value in root["model"].items() if name in COUNTS]]
    while stack:
        value, depth = stack.pop()
        if depth > MAX_DEPTH:
            yield f"it is nested over {MAX_DEPTH} deep"
            return
        if isinstance(value, Mapping):
            yield from _faults_of_part(value)
            stack += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            stack += [(item, depth + 1) for item in value]


def _faults_of_part(part: Mapping) -> Iterator[str]:
    for name in COUNTS:
        value = part.get(name)
        is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ID
        if not is_count and isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{name} is {short(value)}"
    if part.get("type") == "FixedLength" and part.get("length") == 0:
        yield "it cuts into pieces of no length"
    if part.get("type") == "TemplateProcessing" and not _names_its_tokens(part):
        yield "its template names a special token that special_tokens does not hold"
    if part.get("type") == "Precompiled" and not _is_charsmap(part.get("precompiled_charsmap")):
        yield "its precompiled_charsmap is damaged"


def _has_short_piece(model: Mapping) -> bool:
    """Whether there is a merge whose second piece cannot begin with the prefix, which is cut off."""
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not isinstance(prefix, str) or not prefix or not isinstance(merges, list):
        return False
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return any(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], str) and len(pair[1].encode("utf-8", "surrogatepass"))
               < len(prefix.encode("utf-8", "surrogatepass")) for pair in pairs)


def _names_its_tokens(part: Mapping) -> bool:
    """Whether a template's special tokens are all described."""
    described = part.get("special_tokens")
    pieces = [piece for name in ("single", "pair") if isinstance(part.get(name), list) for piece in part[name] if isinstance(piece, Mapping)]
    names = [piece["SpecialToken"].get("id") for piece in pieces if isinstance(piece.get("SpecialToken"), Mapping)]
    return not isinstance(described, Mapping) or all(not isinstance(name, str) or name in described for name in names)


def _is_charsmap(value: object) -> bool:
    """Whether a text is base64 of a table that begins with its number of bytes."""
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except ValueError:
        return False
    size = int.from_bytes(data[:4], "little")
    return 1024 <= size <= len(data) - 4 and size % 4 == 0  # the table's first 256 entries are looked up by a byte


def _apply_flags(root: dict, folder: TokenizerFolder) -> bool:
    """Change what the explicit flags change; returns whether that is anything."""
    adds_space, is_legacy = folder.flag("add_prefix_space"), folder.flag("legacy")
    parts = list(_parts(root.get("pre_tokenizer")))
    is_byte_level = any(part.get("type") == "ByteLevel" for part in (*parts, *_parts(root.get("decoder"))))
    kind = _acting_class(folder, is_byte_level=is_byte_level)
    if kind in BYTE_LEVEL_CLASSES and adds_space is not None:
        changed = [part for part in parts if part.get("type") == "ByteLevel"]
        for part in changed:
            part["add_prefix_space"] = adds_space
        return bool(changed)
    if kind in METASPACE_CLASSES and not is_byte_level and (adds_space, is_legacy) != (None, None):
        scheme = "never" if adds_space is False else "always" if is_legacy and kind == "LlamaTokenizer" else "first"
        return _set_prepend_scheme(root, scheme)
    return False


def _acting_class(folder: TokenizerFolder, *, is_byte_level: bool) -> str | None:
    """The class by which transformers would load the folder; None where that is the one that leaves tokenizer.json as it is."""
    named, model_type = folder.settings.get("tokenizer_class") or folder.config.get("tokenizer_class"), folder.config.get("model_type")
    named = named.removesuffix("Fast") if isinstance(named, str) else None
    model_type = model_type if isinstance(model_type, str) else None
    if model_type in GENERIC_TYPES or (named == "LlamaTokenizer" and is_byte_level and model_type not in FIRM_TYPES):
        return None
    return TYPE_CLASSES.get(model_type) if named is None or model_type in FIRM_TYPES else named


def _set_prepend_scheme(root: dict, scheme: str) -> bool:
    """Where a SentencePiece vocabulary gets the space before a word that has none; False where the file has no such vocabulary."""
    metaspaces = [part for part in _parts(root.get("pre_tokenizer")) if part.get("type") == "Metaspace"]
    normalizers = list(_parts(root.get("normalizer")))
    spaces = [part for part in normalizers if part.get("type") == "Prepend" or part.get("content") == SPACE]
    if spaces and root.get("pre_tokenizer") is None:  # the older form
        kept = [part for part in normalizers if part not in spaces]
        root["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
        root["pre_tokenizer"] = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    elif not metaspaces:
        return False
    for part in metaspaces:
        part["prepend_scheme"] = scheme
        part.pop("add_prefix_space", None)
    decoder = root.get("decoder")
    if isinstance(decoder, dict) and isinstance(decoder.get("decoders"), list):
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        decoder["decoders"] = [part for part in decoder["decoders"] if part != strip] + ([strip] if scheme != "never" else [])
    return True


def _parts(part: object) -> Iterator[dict]:
    """A part of tokenizer.json, or those that it is a sequence of."""
    if isinstance(part, dict):
        inner = next((part[name] for name in ("normalizers", "pretokenizers", "decoders") if isinstance(part.get(name), list)), None)
        if inner is None:
            yield part
        else:
            for one in inner:
                yield from _parts(one)
