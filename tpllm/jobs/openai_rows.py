"""OpenAI batch rows: each is one request of OpenAI's API, and gets OpenAI's own output row.

The forms are those of OpenAI's batch guide: a row ``{"custom_id", "method": "POST", "url", "body"}`` in, a row ``{"id", "custom_id",
"response": {"status_code", "request_id", "body"}, "error"}`` out, where ``error`` is for failures without a response and so always null here.
"""
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from tpllm.jobs.sources.raw_row import custom_id_text, is_custom_id
from tpllm.openai_api import ENDPOINTS, ApiError, ApiRequest, ResponseHead, read_request

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
BATCH_KEYS = ("custom_id", "method", "url", "body")
CREATED = 0
"""``created`` of every response: a time would make a resumed job differ from an uninterrupted one."""
ID_BYTES = 12


def is_batch_row(fields: Mapping[str, Any]) -> bool:
    """Whether a row is meant as one of OpenAI's: it names an endpoint and has a body, or it has no prompt of its own and keys of such a row."""
    if isinstance(fields.get("url"), str) and fields["url"].startswith("/v1/") and fields.get("body") is not None:
        return True
    return not any(fields.get(key) is not None for key in PROMPT_KEYS) and ("body" in fields or {"method", "url"} <= fields.keys())


def read_batch_row(fields: Mapping[str, Any], *, defaults: Mapping[str, Any]) -> ApiRequest:
    """The request of a row.

    Args:
        fields: of a row of which :func:`is_batch_row` is true.
        defaults: the job's sampling over the model's; the body's own goes before it.

    Raises:
        ApiError: a row of another form, or a body that cannot be run.
    """
    if beside := [key for key in (*PROMPT_KEYS, "sampling") if fields.get(key) is not None]:
        raise ApiError(f"the row has {' and '.join(beside)} beside the body; put {'it' if len(beside) == 1 else 'them'} into the body")
    if not is_custom_id(fields.get("custom_id")):
        raise ApiError("custom_id is missing; give each OpenAI batch row a text or a number of its own", param="custom_id",
                       code="missing_required_parameter")
    for key in ("method", "url", "body"):
        if fields.get(key) is None:
            raise ApiError(f'{key} is missing; write {{"custom_id": "...", "method": "POST", "url": "{ENDPOINTS[0]}", "body": {{...}}}}',
                           param=key, code="missing_required_parameter")
    if fields["method"] != "POST":
        raise ApiError(f"method is {json.dumps(fields['method'])[:60]}; it must be \"POST\"", param="method", code="unsupported_value")
    return read_request(fields["url"], fields["body"], defaults=defaults)


def response_head(job_seed: int, index: int, *, model: str, system_fingerprint: str) -> ResponseHead:
    """What the response of a row says of itself: its id is the first 12 bytes of BLAKE2b of ``"openai:<job seed>:<row number>"`` in hex."""
    digest = hashlib.blake2b(f"openai:{job_seed}:{index}".encode(), digest_size=ID_BYTES)
    return ResponseHead(digest.hexdigest(), CREATED, model, system_fingerprint)


def system_fingerprint(section: Mapping[str, Any]) -> str:
    """A name for the model, software and hardware that the manifest records."""
    return "fp_" + hashlib.blake2b(json.dumps(section, sort_keys=True).encode(), digest_size=5).hexdigest()


def batch_output(custom_id: str | int | float, head: ResponseHead, body: Mapping[str, Any], *, status: int = 200) -> dict[str, Any]:
    """OpenAI's output row; its custom_id is text, as OpenAI's types have it, also of a row that has a number."""
    return {"id": f"batch_req_{head.unique_id}", "custom_id": custom_id_text(custom_id),
            "response": {"status_code": status, "request_id": f"req_{head.unique_id}", "body": body}, "error": None}
