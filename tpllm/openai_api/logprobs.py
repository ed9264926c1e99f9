"""Log probabilities in the three forms that OpenAI's and vLLM's responses have."""
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tpllm.engine.outputs import Logprob

UNLIKELY = -9999.0
"""What OpenAI's API says for a token that is not possible: JSON has no minus infinity."""

Scores = Sequence[Mapping[int, Logprob] | None]


def completion_logprobs(text: str, ids: Sequence[int], scores: Scores, texts: Sequence[str], *, top: int) -> dict[str, Any]:
    """The form of ``/v1/completions``: lists over tokens.

    Args:
        text: of the choice, into which ``text_offset`` counts characters.
        ids, scores, texts: of each token; a score is None for the first token of a prompt.
        top: how many likeliest tokens ``top_logprobs`` has, besides the one that was drawn.
    """
    return {
        "text_offset": list(text_offsets(text, texts)),
        "tokens": list(texts),
        "token_logprobs": [None if entry is None else finite(entry[token].logprob, UNLIKELY) for token, entry in zip(ids, scores, strict=True)],
        "top_logprobs": [_by_text(token, entry, top) for token, entry in zip(ids, scores, strict=True)] if top else None,
    }


def chat_logprobs(ids: Sequence[int], scores: Scores, *, top: int) -> dict[str, Any]:
    """The form of ``/v1/chat/completions``: for each token its own log probability and the ``top`` likeliest tokens."""
    content = [{**_token(entry[token]), "top_logprobs": [_token(score) for _, score in _likeliest(entry, top)]}
               for token, entry in zip(ids, scores, strict=True)]
    return {"content": content, "refusal": None}


def logprobs_by_id(tokens: Scores, *, impossible: float | None = None) -> list[dict[str, Any] | None]:
    """Makes of each token an object token id -> {logprob, rank, decoded_token}, as in vLLM's responses and in the Python API.

    Args:
        tokens: their scores; None for the first token of a prompt.
        impossible: stands for minus infinity.
    """
    return [None if token is None else {
        str(token_id): {"logprob": finite(entry.logprob, impossible), "rank": int(entry.rank), "decoded_token": entry.decoded_token}
        for token_id, entry in token.items()} for token in tokens]


def finite(value: float, impossible: float | None = None) -> float | None:
    """The value itself, or ``impossible`` for an infinite one."""
    return float(value) if math.isfinite(value) else impossible


def text_offsets(text: str, texts: Sequence[str]) -> Iterator[int]:
    """Where each token's text begins in the whole text.

    A token that is not there as it stands (a special token, a part of a character, what a stop string cut off) begins where the last one
    that is there ended.
    """
    position = passed = 0
    for token in texts:
        passed += len(token)
        found = text.find(token, position, position + passed) if token else -1
        if found < 0:
            yield position
        else:
            yield found
            position, passed = found + len(token), 0


def _by_text(token: int, entry: Mapping[int, Logprob] | None, top: int) -> dict[str, float] | None:
    """Text -> log probability: the likeliest ``top`` and the token itself; of two tokens of one text the likelier."""
    if entry is None:
        return None
    shown = dict(_likeliest(entry, top))
    shown.setdefault(token, entry[token])
    result: dict[str, float] = {}
    for score in shown.values():
        result.setdefault(score.decoded_token, finite(score.logprob, UNLIKELY))
    return result


def _likeliest(entry: Mapping[int, Logprob], top: int) -> list[tuple[int, Logprob]]:
    return sorted(entry.items(), key=lambda item: -item[1].logprob)[:top]


def _token(score: Logprob) -> dict[str, Any]:
    """A part of a character has no bytes here: its text, U+FFFD, does not tell which ones they are."""
    text = score.decoded_token
    return {"token": text, "logprob": finite(score.logprob, UNLIKELY), "bytes": None if "\ufffd" in text else list(text.encode())}
