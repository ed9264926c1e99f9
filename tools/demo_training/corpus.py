"""The text: Python's standard library as installed with the Python that runs this, in documents, tokens and windows.

One document is one top-level definition (or the run of statements between two): BOS, text, EOS. A tenth of the files, by a hash of their
path, is held out.
"""
import ast
import itertools
import pathlib
import warnings
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tpllm.bench.held_out import library_files

BOS, EOS, PAD, TURN, TURN_END = range(5)
SPECIALS = ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]


def sources(*, is_held_out: bool) -> Iterator[tuple[pathlib.PurePath, str, ast.Module]]:
    """(path below the library, text, its tree) of every file of one split, in order."""
    for name, text in library_files(is_held_out=is_held_out):
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes that are not any, in old files
                tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue  # files that test the parser's errors
        yield name, text, tree


def documents(*, is_held_out: bool) -> list[str]:
    """Every document of one split, in the order of their files."""
    return [piece for _, text, tree in sources(is_held_out=is_held_out) for piece in top_level_pieces(text, tree)]


def top_level_pieces(text: str, tree: ast.Module) -> list[str]:
    """A module cut before each top-level definition and after its end."""
    lines, cuts = text.splitlines(keepends=True), {0}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            cuts |= {first - 1, node.end_lineno}
    bounds = sorted(cuts | {len(lines)})
    pieces = ("".join(lines[start:end]).strip("\n") for start, end in itertools.pairwise(bounds))
    return [piece + "\n" for piece in pieces if piece.strip()]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with GPT-2's pre-tokenization, which every runtime knows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIALS, show_progress=False,
                                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{SPECIALS[BOS]} $A", pair=f"{SPECIALS[BOS]} $A {SPECIALS[BOS]} $B",
                                                             special_tokens=[(SPECIALS[BOS], BOS)])
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """BOS, document, EOS, BOS, document, EOS, ..."""
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array([BOS, *encoding.ids, EOS], np.int32) for encoding in encoded])


def held_out_windows(tokenizer: Tokenizer, length: int, num_windows: int, seed: int) -> list[np.ndarray]:
    """Some of the held-out text's windows: ``length`` tokens to predict, after one that only conditions."""
    stream = token_stream(tokenizer, documents(is_held_out=True))
    starts = np.random.default_rng(seed).permutation(np.arange(0, len(stream) - length - 1, length))[:num_windows]
    return [stream[start:start + length + 1] for start in starts]
