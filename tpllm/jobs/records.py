"""From what the engine gives back to a line of output."""
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tpllm.engine.outputs import CompletionOutput, Logprob, RequestOutput
from tpllm.jobs.journal import FinishedRow
from tpllm.jobs.rows import Row
from tpllm.jobs.source import RawRow, custom_id_of


def output_row(row: Row, output: RequestOutput) -> FinishedRow:
    """The line of a finished row: the input row's keys, then ``custom_id``, ``outputs`` and ``usage`` (which replace keys of that name).

    A row that the engine refused becomes an error line.
    """
    errors = [completion.error or "unknown error" for completion in output.outputs if completion.finish_reason == "error"]
    if errors:
        return error_row(row.raw, errors[0], row=row)
    completions = sorted(output.outputs, key=lambda completion: completion.index)
    record = {**row.fields, "custom_id": row.custom_id, "outputs": [_completion(completion) for completion in completions]}
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = _logprobs(output.prompt_logprobs)
    record["usage"] = {
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": sum(len(completion.token_ids) for completion in completions),
        "cached_tokens": output.num_cached_tokens,
    }
    return FinishedRow(row.raw.index, False, to_line(record))


def error_row(raw: RawRow, message: str, *, row: Row | None = None) -> FinishedRow:
    """The line of a row that could not be run: ``custom_id``, ``row`` (from 0), ``line`` of the file (from 1), ``error``, and, where it
    could be parsed, the ``input`` row."""
    record = {"custom_id": custom_id_of(raw.data, raw.index), "row": raw.index, "line": raw.line, "error": message}
    if row is not None:
        record["input"] = dict(row.fields)
    return FinishedRow(raw.index, True, to_line(record))


def to_line(record: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8 on one line; escaped to ASCII where it holds half of a surrogate pair."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(record, allow_nan=False).encode("ascii")


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    record: dict[str, Any] = {
        "index": completion.index, "text": completion.text, "token_ids": list(map(int, completion.token_ids)),
        "finish_reason": completion.finish_reason,
    }
    if completion.stop_reason is not None:
        record["stop_reason"] = completion.stop_reason
    if completion.logprobs is not None:
        record["cumulative_logprob"] = _number(completion.cumulative_logprob)
        record["logprobs"] = _logprobs(completion.logprobs)
    return record


def _logprobs(tokens: Sequence[Mapping[int, Logprob] | None]) -> list[dict[str, Any] | None]:
    """For each token an object token id -> {logprob, rank, decoded_token}, as in the Python API."""
    return [None if token is None else {
        str(token_id): {"logprob": _number(entry.logprob), "rank": int(entry.rank), "decoded_token": entry.decoded_token}
        for token_id, entry in token.items()} for token in tokens]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
