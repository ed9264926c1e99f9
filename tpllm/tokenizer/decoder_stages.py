"""The decoders of tokenizer.json as streams: each takes one piece at a time and gives what no later piece can change.

A tokenizer's decoder maps the list of a completion's token texts to a list of texts that are then joined. Each stage here is one such map,
fed piece by piece. A decoder whose result a later piece can always change is not streamed: it gives everything at the end.
"""
import abc
import codecs
import functools
import json
import re

from tokenizers import decoders

from tpllm.tokenizer.backend import border

BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
STREAMED_BY_PIECE = {"Replace", "Strip", "Metaspace", "WordPiece"}
TREATS_FIRST_PIECE_APART = {"Metaspace", "WordPiece"}
CLEANED_UP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"),
              (" 're", "'re"))
"""What ``clean_up_tokenization_spaces`` replaces, in this order."""


class Stage(abc.ABC):
    """One map over the pieces of a text."""

    @abc.abstractmethod
    def push(self, piece: str) -> list[str]:
        """Take one piece, give the pieces that are now certain."""

    def finish(self) -> list[str]:
        """Give the rest, which is nothing where no piece is held back; no piece follows."""
        return []


class ByPiece(Stage):
    """A decoder that looks at one piece, and at whether it is the first."""

    def __init__(self, decoder: decoders.Decoder, *, treats_first_apart: bool):
        self.decoder, self.treats_first_apart, self.is_first = decoder, treats_first_apart, True

    def push(self, piece: str) -> list[str]:
        pieces = ["", piece] if self.treats_first_apart and not self.is_first else [piece]
        self.is_first = False
        return [self.decoder.decode(pieces)]


class Spaced(Stage):
    """No decoder at all: pieces are joined with spaces."""

    is_first = True

    def push(self, piece: str) -> list[str]:
        text = piece if self.is_first else " " + piece
        self.is_first = False
        return [text]


class SuffixedWords(Stage):
    """``BPEDecoder``: the suffix ends a word, and gives a space unless the piece is the last one."""

    def __init__(self, decoder: decoders.Decoder):
        self.decoder, self.held = decoder, None

    def push(self, piece: str) -> list[str]:
        before, self.held = self.held, piece
        return [] if before is None else [self.decoder.decode([before, ""])]

    def finish(self) -> list[str]:
        return [] if self.held is None else [self.decoder.decode([self.held])]


class ByteFallback(Stage):
    """A run of byte tokens is UTF-8 as a whole, or one replacement character for each of its bytes: it is certain only when it ends."""

    def __init__(self):
        self.run = bytearray()

    def push(self, piece: str) -> list[str]:
        if match := BYTE_TOKEN.fullmatch(piece):
            self.run.append(int(match[1], 16))
            return []
        return [*self.finish(), piece]

    def finish(self) -> list[str]:
        run, self.run = bytes(self.run), bytearray()
        try:
            return [run.decode("utf-8")] if run else []
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)


class ByteLevel(Stage):
    """Characters stand for bytes (GPT-2's table); a piece that holds any other character is its own UTF-8."""

    def __init__(self):
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: str) -> list[str]:
        try:
            data = bytes(byte_of_character()[character] for character in piece)
        except KeyError:
            data = piece.encode("utf-8")
        return [self.utf8.decode(data)]

    def finish(self) -> list[str]:
        return [self.utf8.decode(b"", final=True)]


class LeadingStrip(Stage):
    """``Strip`` on the joined text: takes at most ``count`` of one character off its start."""

    def __init__(self, character: str, count: int):
        self.character, self.left = character, count

    def push(self, piece: str) -> list[str]:
        while self.left and piece:
            if piece[0] != self.character:
                self.left = 0
                break
            piece, self.left = piece[1:], self.left - 1
        return [piece]


class Replaced(Stage):
    """``str.replace`` on the joined text: an end that may begin what is replaced is held back."""

    def __init__(self, old: str, new: str):
        self.old, self.new, self.held = old, new, ""

    def push(self, piece: str) -> list[str]:
        *before, rest = (self.held + piece).split(self.old)
        num_held = next(size for size in range(len(self.old) - 1, -1, -1) if rest.endswith(self.old[:size]))
        self.held = rest[len(rest) - num_held:]
        return [self.new.join([*before, rest[:len(rest) - num_held]])]

    def finish(self) -> list[str]:
        held, self.held = self.held, ""
        return [held]


class Whole(Stage):
    """Decoders that cannot be streamed: all of it at the end."""

    def __init__(self, decoder: decoders.Decoder, *, is_joined: bool):
        self.decoder, self.is_joined, self.pieces = decoder, is_joined, []

    def push(self, piece: str) -> list[str]:
        self.pieces.append(piece)
        return []

    def finish(self) -> list[str]:
        pieces, self.pieces = self.pieces, []
        return [self.decoder.decode(["".join(pieces)] if self.is_joined else pieces)]


@functools.cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def decoder_specs(decoder: decoders.Decoder | None) -> list[dict]:
    """A decoder as tokenizer.json writes it, with sequences laid flat; empty where pieces are joined with spaces."""
    return [] if decoder is None else _flat(json.loads(decoder.__getstate__()))


def make_stages(specs: list[dict]) -> list[Stage]:
    """Fresh stages for one text."""
    stages, is_joined = [] if specs else [Spaced()], False
    for index, spec in enumerate(specs):
        kind = spec["type"]
        if kind == "Fuse":
            is_joined = True
            continue
        stage = _joined_stage(spec) if is_joined else _piece_stage(spec)
        if stage is None:
            return [*stages, Whole(_decoder({"type": "Sequence", "decoders": specs[index:]}), is_joined=is_joined)]
        stages.append(stage)
        is_joined = is_joined or kind == "ByteLevel"
    return stages


def clean_up_stages() -> list[Stage]:
    """Fresh stages that take the spaces before punctuation marks away."""
    return [Replaced(old, new) for old, new in CLEANED_UP]


def _piece_stage(spec: dict) -> Stage | None:
    kind = spec["type"]
    if kind in STREAMED_BY_PIECE:
        return ByPiece(_decoder(spec), treats_first_apart=kind in TREATS_FIRST_PIECE_APART)
    if kind == "BPEDecoder":
        return SuffixedWords(_decoder(spec))
    return {"ByteFallback": ByteFallback, "ByteLevel": ByteLevel}.get(kind, lambda: None)()


def _joined_stage(spec: dict) -> Stage | None:
    if spec["type"] == "Strip" and spec["stop"] == 0:
        return LeadingStrip(spec["content"], spec["start"])
    if spec["type"] == "Replace" and len(spec["pattern"].get("String", "")) == 1:
        return ByPiece(_decoder(spec), treats_first_apart=False)
    return None


def _flat(spec: dict) -> list[dict]:
    if spec["type"] != "Sequence":
        return [spec]
    return [leaf for part in spec["decoders"] for leaf in _flat(part)]


def _decoder(spec: dict) -> decoders.Decoder:
    decoder = decoders.Fuse()  # any kind will do: the state replaces it
    decoder.__setstate__(json.dumps(spec).encode("utf-8"))
    return decoder


def run_stages(stages: list, pieces: list[str], *, is_last: bool = False) -> str:
    """Send pieces through the stages, and at the end their held-back rests too."""
    with border("the tokenizer fails on token ids"):
        for stage in stages:
            pieces = [text for piece in pieces for text in stage.push(piece)]
            if is_last:
                pieces += stage.finish()
        return "".join(pieces)
