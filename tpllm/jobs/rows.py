"""Makes a request of a line of input."""
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from tpllm.engine.prompts import Prompt
from tpllm.engine.sampling_params import SamplingParams
from tpllm.engine.whole_numbers import whole, whole_sampling
from tpllm.errors import JobError, SamplingError
from tpllm.jobs.config import SAMPLING_KEYS, check_keys
from tpllm.jobs.json_line import is_deeper
from tpllm.jobs.openai_rows import PROMPT_KEYS, is_batch_row, read_batch_row
from tpllm.jobs.prompt_template import fields_of, render
from tpllm.jobs.sources.raw_row import RawRow, is_custom_id
from tpllm.openai_api import ApiError, ApiRequest

SEED_BYTES = 8
MAX_DEPTH = 100
"""How deep lists and objects may be nested: their reader calls itself for each level."""


class RowError(ValueError):
    """A row that cannot be run; it becomes a line of the errors file.

    Attributes:
        api_error: what the response to an OpenAI batch row says of it; None for another row.
    """

    def __init__(self, message: str, api_error: ApiError | None = None):
        super().__init__(message)
        self.api_error = api_error


@dataclasses.dataclass(frozen=True)
class Row:
    """One readable row.

    Attributes:
        raw: the row as it stands in the input.
        fields: its keys and values.
        custom_id: given, text or a number, or the row number as text.
    """

    raw: RawRow
    fields: Mapping[str, Any]
    custom_id: str | int | float


@dataclasses.dataclass(frozen=True)
class RowRequest:
    """What the engine is asked for one row.

    Attributes:
        row: whose.
        prompts: each with its parameters. More than one only of an OpenAI batch row whose body has a list of prompts.
        api: the body of an OpenAI batch row; None for another row.
    """

    row: Row
    prompts: tuple[tuple[Prompt, SamplingParams], ...]
    api: ApiRequest | None = None


def row_seed(job_seed: int, index: int, place: int = 0) -> int:
    """The seed of one row: the first 8 bytes of BLAKE2b of ``"<job seed>:<row number>"``, little endian.

    It depends on nothing else, so a row's tokens do not depend on its neighbours, the order, the parts or a resume. Where a row has several
    prompts, those after the first have ``":<place>"`` at the end, counted from 0.
    """
    digest = hashlib.blake2b(f"{job_seed}:{index}{f':{place}' if place else ''}".encode(), digest_size=SEED_BYTES).digest()
    return int.from_bytes(digest, "little")


def read_row(raw: RawRow) -> Row:
    """Parse one line.

    Raises:
        RowError: not UTF-8, not JSON, nested too deeply, or not an object.
    """
    try:
        fields = json.loads(raw.data.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise RowError("not JSON: nested too deeply") from None
    except ValueError as error:
        raise RowError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RowError(f'the row is {_short(fields)}; it must be an object such as {{"prompt": "..."}}')
    if raw.data.count(b"[") + raw.data.count(b"{") > MAX_DEPTH and is_deeper(fields, MAX_DEPTH):
        raise RowError(f"the row is nested too deeply: over {MAX_DEPTH} lists and objects in each other")
    custom_id = fields.get("custom_id")
    return Row(raw, fields, custom_id if is_custom_id(custom_id) else str(raw.index))


def row_request(row: Row, *, job_seed: int, sampling: Mapping[str, Any], prompt_template: str | None = None) -> RowRequest:
    """What to ask the engine for a row.

    Args:
        row: a readable row.
        job_seed: the job's seed; see :func:`row_seed`.
        sampling: the job's sampling over the model's defaults. The row's own goes before it; a ``seed`` in either goes before the row's.
        prompt_template: makes the prompt of the row's fields; None where the row has it.

    Raises:
        RowError: no prompt, or one of the wrong type; a field of the template that is not there; an unknown sampling key or a value out of its
            range; a custom_id that is neither text nor a number.
    """
    if is_batch_row(row.fields):
        if prompt_template is not None:
            raise RowError("an OpenAI batch row has its prompt in its body; leave prompt_template out of the job")
        return _batch_row_request(row, job_seed=job_seed, sampling=sampling)
    if row.fields.get("custom_id") is not None and not is_custom_id(row.fields["custom_id"]):
        raise RowError(f"custom_id is {_short(row.fields['custom_id'])}; it must be text or a number")
    own = row.fields.get("sampling")
    if own is not None and not isinstance(own, dict):
        raise RowError(f"sampling is {_short(own)}; it must be an object such as {{\"temperature\": 0}}")
    try:
        check_keys(own or (), SAMPLING_KEYS, prefix="sampling.")
        values = {**sampling, **whole_sampling(own or {})}
        if values.get("seed") is None:
            values["seed"] = row_seed(job_seed, row.raw.index)
        params = SamplingParams(**values)
    except SamplingError as error:
        raise RowError(f"sampling: {error}") from None
    except JobError as error:
        raise RowError(str(error)) from None
    return RowRequest(row, ((_prompt(row.fields if prompt_template is None else _with_prompt(row.fields, prompt_template)), params),))


def _batch_row_request(row: Row, *, job_seed: int, sampling: Mapping[str, Any]) -> RowRequest:
    try:
        api = read_batch_row(row.fields, defaults=sampling)
    except ApiError as error:
        raise RowError(str(error), error) from None
    return RowRequest(row, tuple(
        (prompt, api.params if api.params.seed is not None else dataclasses.replace(api.params, seed=row_seed(job_seed, row.raw.index, place)))
        for place, prompt in enumerate(api.prompts)), api)


def _with_prompt(fields: Mapping[str, Any], template: str) -> dict[str, Any]:
    """A row's fields with the prompt that the template makes of them in place of its own."""
    if beside := [key for key in PROMPT_KEYS if fields.get(key) is not None and key not in fields_of(template)]:
        raise RowError(f"the row has {' and '.join(beside)}, and the job's prompt_template makes the prompt; name it there as {{{beside[0]}}}, or "
                       "leave one of them out")
    try:
        return {**{key: value for key, value in fields.items() if key not in PROMPT_KEYS}, "prompt": render(template, fields)}
    except JobError as error:
        raise RowError(str(error)) from None


def _prompt(fields: Mapping[str, Any]) -> Prompt:
    given = [key for key in PROMPT_KEYS if fields.get(key) is not None]
    if len(given) != 1:
        found = f"the row has {' and '.join(given)}" if given else f"the row has {', '.join(map(repr, fields)) or 'no keys'} and no prompt"
        raise RowError(f"{found}; give exactly one of prompt, prompt_token_ids and messages, or set "
                       "prompt_template in the job")
    _check_text(given[0], fields[given[0]])
    parse_special = fields.get("parse_special")
    if not isinstance(parse_special, bool | None):
        raise RowError(f"parse_special is {_short(parse_special)}; it must be true or false")
    option = {} if parse_special is None else {"parse_special": parse_special}
    if given[0] == "messages":
        return {**_chat(fields), **option}
    if given[0] == "prompt" and isinstance(fields["prompt"], str):
        return {"prompt": fields["prompt"], **option} if option else fields["prompt"]
    ids = list(map(whole, fields[given[0]])) if isinstance(fields[given[0]], list) else None
    if ids is None or not all(type(token) is int for token in ids):
        raise RowError(f"{given[0]} is {_short(fields[given[0]])}; it must be {'text or ' if given[0] == 'prompt' else ''}a list of token ids")
    return {"prompt_token_ids": ids}


def _chat(fields: Mapping[str, Any]) -> Prompt:
    messages, template_kwargs = fields["messages"], fields.get("template_kwargs")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) and isinstance(message.get("role"), str)
                                                                for message in messages):
        raise RowError(f'messages is {_short(messages)}; it must be a list such as [{{"role": "user", "content": "..."}}]')
    if template_kwargs is None:
        return {"messages": messages}
    if not isinstance(template_kwargs, dict):
        raise RowError(f"template_kwargs is {_short(template_kwargs)}; it must be an object")
    return {"messages": messages, "template_kwargs": template_kwargs}


def _check_text(key: str, value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"{key} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is beyond the range of a 64-bit float")
    return value


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."
