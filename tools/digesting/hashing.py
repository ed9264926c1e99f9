"""SHA-256 of arrays, outputs and files, such that equal digests mean equal bits."""
from __future__ import annotations

import hashlib
import pathlib
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tools.digesting import tree


def of_parameters(params: Any) -> str:
    """Names, shapes and dense float32 values of all parameters."""
    digest = hashlib.sha256()
    for name, leaf in sorted(tree.named_parameters(params)):
        values = np.ascontiguousarray(tree.dense_values(leaf))
        digest.update(f"{name} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def of_tokens(outputs: Iterable[Any]) -> str:
    """What requests were answered: token ids, text, and why each completion ended."""
    digest = hashlib.sha256()
    for output in outputs:
        told = [output.prompt_token_ids, [(one.index, one.token_ids, one.text, one.finish_reason, one.stop_reason) for one in output.outputs]]
        digest.update(f"{told!r}\n".encode())
    return digest.hexdigest()


def of_logprobs(outputs: Iterable[Any]) -> str:
    """The bits of every log probability that requests were told: cumulative ones, those of tokens, of the likeliest ones, and of the prompt."""
    digest = hashlib.sha256()
    for output in outputs:
        _add_reported(digest, output.prompt_logprobs)
        for completion in output.outputs:
            digest.update(struct.pack("<d", completion.cumulative_logprob))
            _add_reported(digest, completion.logprobs)
    return digest.hexdigest()


def _add_reported(digest: Any, reported: list[Mapping[int, Any] | None] | None) -> None:
    digest.update(b"none" if reported is None else struct.pack("<q", len(reported)))
    for entries in reported or ():
        for token, entry in sorted((entries or {}).items()):
            digest.update(struct.pack("<qdq", token, entry.logprob, entry.rank) + entry.decoded_token.encode())
        digest.update(b"|")


def of_files(folder: pathlib.Path, pattern: str) -> str:
    """Names and bytes of files.

    Raises:
        FileNotFoundError: there are none.
    """
    digest, paths = hashlib.sha256(), sorted(folder.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"{folder} has no {pattern}")
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def of_text(text: str) -> str:
    """Of its UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()
