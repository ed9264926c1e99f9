"""Makes a line of output of what the engine gives back."""
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from tpllm.engine.outputs import CompletionOutput, RequestOutput
from tpllm.jobs.json_line import to_line
from tpllm.jobs.openai_rows import BATCH_KEYS, batch_output, is_batch_row, response_head
from tpllm.jobs.outputs.journal import FinishedRow
from tpllm.jobs.rows import Row, RowError, RowRequest
from tpllm.jobs.sources.raw_row import RawRow, custom_id_of
from tpllm.openai_api import ApiError, ResponseHead, finite, logprobs_by_id, response_body
from tpllm.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Records:
    """Makes the lines of one job's rows.

    Attributes:
        job_seed: ids of responses to OpenAI batch rows are derived from it and the row's number.
        model: that such a response names: the job's, whatever the row asked for.
        system_fingerprint: that it names.
        get_tokenizer: gives the model's tokenizer.
    """

    job_seed: int
    model: str
    system_fingerprint: str
    get_tokenizer: Callable[[], Tokenizer]

    def output(self, request: RowRequest, outputs: Sequence[RequestOutput]) -> FinishedRow:
        """The line of a finished row. A row that the engine refused becomes an error line.

        A plain row keeps its keys and gets ``custom_id``, ``outputs`` and ``usage``, which replace keys of that name. An OpenAI batch row becomes
        OpenAI's output row, and keeps only keys that are no part of an OpenAI batch row.
        """
        row = request.row
        try:
            if request.api is None:
                record = {**row.fields, "custom_id": row.custom_id, **_output(outputs[0])}
            else:
                body = response_body(request.api, outputs, self._head(row.raw), get_tokenizer=self.get_tokenizer)
                record = self._batch_record(row, batch_output(row.custom_id, self._head(row.raw), body))
        except RowError as error:
            return self.error(row.raw, error, row=row)
        except ApiError as error:
            return self.error(row.raw, RowError(str(error), error), row=row)
        return FinishedRow(row.raw.index, False, to_line(record))

    def error(self, raw: RawRow, error: RowError, *, row: Row | None = None) -> FinishedRow:
        """The line of a row that could not be run: ``custom_id``, ``row`` (from 0), ``file`` and ``line`` (from 1; of a Parquet file
        ``file_row``, from 0), ``error``, and, where it could be parsed, the ``input`` row.

        Of an OpenAI batch row it begins with OpenAI's own keys; the message is in ``response.body.error`` and ``error`` is null.
        """
        custom_id, place, api_error = custom_id_of(raw.data, raw.index), {"row": raw.index, **raw.place}, error.api_error
        if api_error is None and row is not None and is_batch_row(row.fields):
            api_error = ApiError(str(error))
        if api_error is None:
            record = {"custom_id": custom_id, **place, "error": str(error)}
        else:
            record = {**batch_output(custom_id, self._head(raw), api_error.body(), status=api_error.status), **place}
        if row is not None:
            record["input"] = dict(row.fields)
        return FinishedRow(raw.index, True, to_line(record))

    def _head(self, raw: RawRow) -> ResponseHead:
        return response_head(self.job_seed, raw.index, model=self.model, system_fingerprint=self.system_fingerprint)

    @staticmethod
    def _batch_record(row: Row, record: dict[str, Any]) -> dict[str, Any]:
        return {**record, **{key: value for key, value in row.fields.items() if key not in record and key not in BATCH_KEYS}}


def describe_failure(line: bytes) -> str:
    """The row of an error line, where it lies, and why it failed."""
    record = json.loads(line)
    place = f"line {record['line']}" if "line" in record else f"row {record['file_row']}"
    reason = record.get("error") or record["response"]["body"]["error"]["message"]
    return f"row {record['row']} ({record['file']} {place}): {reason}"


def _output(output: RequestOutput) -> dict[str, Any]:
    """``outputs``, ``usage`` and, where they were asked for, ``prompt_logprobs``.

    Raises:
        RowError: the engine refused the prompt, or a completion failed.
    """
    for completion in output.outputs:
        if completion.finish_reason == "error":
            raise RowError(completion.error or "unknown error")
    completions = sorted(output.outputs, key=lambda completion: completion.index)
    record: dict[str, Any] = {"outputs": [_completion(completion) for completion in completions]}
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = logprobs_by_id(output.prompt_logprobs)
    record["usage"] = {
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": sum(len(completion.token_ids) for completion in completions),
        "cached_tokens": output.num_cached_tokens,
    }
    return record


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    record: dict[str, Any] = {
        "index": completion.index, "text": completion.text, "token_ids": list(map(int, completion.token_ids)),
        "finish_reason": completion.finish_reason,
    }
    if completion.stop_reason is not None:
        record["stop_reason"] = completion.stop_reason
    if completion.logprobs is not None:
        record["cumulative_logprob"] = finite(completion.cumulative_logprob)
        record["logprobs"] = logprobs_by_id(completion.logprobs)
    return record
