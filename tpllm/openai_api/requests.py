"""Makes prompts and sampling parameters of the body of an OpenAI request.

Names and meanings are those of OpenAI's API reference (``POST /v1/completions``, ``POST /v1/chat/completions``); further sampling parameters
have vLLM's names. A key whose value is null counts as not given.
"""
import dataclasses
from collections.abc import Mapping
from typing import Any

from tpllm.engine.prompts import Prompt
from tpllm.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from tpllm.engine.whole_numbers import SAMPLING_KINDS, as_kind
from tpllm.errors import SamplingError, did_you_mean
from tpllm.openai_api.api_error import ApiError, shortened
from tpllm.openai_api.prompts import chat_prompt, completion_prompts, with_parse_special

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
ENDPOINTS = (COMPLETIONS, CHAT)
DEFAULTS: dict[str, dict[str, Any]] = {COMPLETIONS: {"max_tokens": 16}, CHAT: {}}
"""OpenAI's own, where they differ from :class:`SamplingParams`."""

SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams) if field.name not in ("logprobs", "output_kind"))
WITHOUT_EFFECT = ("cache_salt", "metadata", "parallel_tool_calls", "prediction", "priority", "prompt_cache_key", "prompt_cache_options",
                  "prompt_cache_retention", "request_id", "safety_identifier", "service_tier", "store", "stream_options", "user")
"""What cannot matter to an answer: what concerns only the service that gives it, and how fast it comes."""
OWN = {
    COMPLETIONS: ("model", "prompt", "logprobs", "echo", "best_of", "parse_special"),
    CHAT: ("model", "messages", "logprobs", "top_logprobs", "max_completion_tokens", "tools", "tool_choice", "chat_template_kwargs",
           "reasoning_effort", "add_generation_prompt", "parse_special"),
}
LIMITED: dict[str, dict[str, tuple[Any, ...]]] = {
    COMPLETIONS: {"stream": (False,), "suffix": ("",), "add_special_tokens": (True,)},
    CHAT: {"stream": (False,), "response_format": ({"type": "text"},), "audio": (), "modalities": (["text"],), "functions": ([],),
           "function_call": ("none",), "web_search_options": (), "moderation": (), "verbosity": ("medium",), "echo": (False,),
           "add_special_tokens": (False,)},
}
"""Keys of which only these values can be served: what would be done anyway."""
NUMBERS = {**SAMPLING_KINDS, **dict.fromkeys(("logprobs", "top_logprobs", "max_completion_tokens", "best_of"), int)}


@dataclasses.dataclass(frozen=True)
class ApiRequest:
    """What a body asks for.

    Attributes:
        endpoint: one of :data:`ENDPOINTS`.
        model: that the body names, or None; whoever runs the request decides what to make of it.
        prompts: for the engine, in order; more than one only of a completion.
        params: for each of them; ``seed`` is None where neither the body nor the defaults give one.
        is_echo: whether each text begins with its prompt.
        is_prompt_only: whether nothing is to be generated (``echo`` with ``max_tokens`` 0); the engine is asked for one token all the same.
        num_top_logprobs: how many likeliest tokens are shown; None where no log probabilities are.
        shows_prompt_logprobs: whether vLLM's ``prompt_logprobs`` are shown.
    """

    endpoint: str
    model: str | None
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    is_echo: bool = False
    is_prompt_only: bool = False
    num_top_logprobs: int | None = None
    shows_prompt_logprobs: bool = False

    @property
    def is_chat(self) -> bool:
        """Whether it is a chat completion."""
        return self.endpoint == CHAT


def read_request(endpoint: object, body: object, *, defaults: Mapping[str, Any] | None = None) -> ApiRequest:
    """What the body of a request asks for.

    Args:
        endpoint: its path, such as ``"/v1/completions"``.
        body: the parsed JSON.
        defaults: fields of :class:`SamplingParams`; the body's go before them, OpenAI's defaults come after.

    Raises:
        ApiError: an endpoint, a key or a value that cannot be served; of an unknown key the nearest known one is named.
    """
    if endpoint not in ENDPOINTS:
        raise ApiError(f"the endpoint is {shortened(endpoint)}; it must be {' or '.join(ENDPOINTS)}", param="url", code="unsupported_value")
    if not isinstance(body, Mapping):
        raise ApiError(f"body is {shortened(body)}; it must be an object", param="body", code="invalid_type")
    given = _checked_keys(endpoint, body)
    is_echo, defaults = given.get("echo", False), defaults or {}
    num_top_logprobs = _num_chat_logprobs(given) if endpoint == CHAT else given.get("logprobs")
    if "logprobs" not in given:
        num_top_logprobs = defaults.get("logprobs")
    prompts = with_parse_special((chat_prompt(given),) if endpoint == CHAT else completion_prompts(given.get("prompt")), given.get("parse_special"))
    sampling = {key: value for key, value in given.items() if key in SAMPLING}
    if "max_completion_tokens" in given:
        sampling["max_tokens"] = _max_completion_tokens(given)
    is_prompt_only = is_echo and type(sampling.get("max_tokens")) is int and sampling["max_tokens"] == 0
    params = _params({**DEFAULTS[endpoint], **defaults}, {**sampling, "logprobs": num_top_logprobs, **({"max_tokens": 1} if is_prompt_only else {})})
    best_of = given.get("best_of", params.n)
    if best_of != params.n:
        raise ApiError(f"best_of is {best_of} and n is {params.n}; choosing among more than n is not supported yet: leave best_of out",
                       param="best_of", code="unsupported_value")
    shows_prompt_logprobs = params.prompt_logprobs is not None
    if is_echo and num_top_logprobs is not None:
        params = dataclasses.replace(params, prompt_logprobs=max(num_top_logprobs, params.prompt_logprobs or 0))
    return ApiRequest(endpoint, given.get("model"), prompts, params, is_echo, is_prompt_only, num_top_logprobs, shows_prompt_logprobs)


def known_keys(endpoint: str) -> tuple[str, ...]:
    """The keys that a body may have."""
    return *OWN[endpoint], *SAMPLING, *LIMITED[endpoint], *WITHOUT_EFFECT


def _guess(endpoint: str, key: str) -> str:
    if others := [other for other in ENDPOINTS if other != endpoint and key in known_keys(other)]:
        return f"it belongs to {others[0]}; "
    return did_you_mean(key, known_keys(endpoint))


def _checked_keys(endpoint: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are given, without those of no effect."""
    limited, known = LIMITED[endpoint], known_keys(endpoint)
    for key, value in body.items():
        if key not in known:
            raise ApiError(f"unknown key {key!r}; {_guess(endpoint, key)}known: {', '.join(sorted(known))}", param=key, code="unknown_parameter")
        if value is not None and key in limited and not any(type(value) is type(one) and _without_nulls(value) == one for one in limited[key]):
            only = " or ".join(map(shortened, limited[key]))
            raise ApiError(f"{key} is {shortened(value)}, which is not supported yet; leave it out{f', or use {only}' if only else ''}", param=key,
                           code="unsupported_value")
    given = {key: value for key, value in body.items() if value is not None and key not in limited and key not in WITHOUT_EFFECT}
    given = {key: as_kind(value, NUMBERS.get(key)) for key, value in given.items()}
    for key, kind, text in (("model", str, "text"), ("reasoning_effort", str, "text"), ("echo", bool, "true or false"),
                            ("best_of", int, "a whole number")):
        if key in given and type(given[key]) is not kind:
            raise ApiError(f"{key} is {shortened(given[key])}; it must be {text}", param=key, code="invalid_type")
    return given


def _without_nulls(value: Any) -> Any:
    """A null in an object is a key that is not given, however deep it lies."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _num_chat_logprobs(given: Mapping[str, Any]) -> int | None:
    """How many log probabilities a chat asks for: ``logprobs`` says whether, and ``top_logprobs`` how many."""
    shown, top = given.get("logprobs", False), given.get("top_logprobs")
    if not isinstance(shown, bool):
        raise ApiError(f"logprobs is {shortened(shown)}; in a chat it must be true or false, and top_logprobs says how many", param="logprobs",
                       code="invalid_type")
    if not shown and top is not None:
        raise ApiError(f"top_logprobs is {shortened(top)} without logprobs; add \"logprobs\": true", param="top_logprobs", code="invalid_value")
    try:
        return _checked(SamplingParams(logprobs=0 if top is None else top)).logprobs if shown else None
    except SamplingError as error:
        raise ApiError(f"top_{error}", param="top_logprobs", code="invalid_value") from None


def _max_completion_tokens(given: Mapping[str, Any]) -> Any:
    if given.get("max_tokens", given["max_completion_tokens"]) != given["max_completion_tokens"]:
        raise ApiError(f"max_tokens is {shortened(given['max_tokens'])} and max_completion_tokens is {shortened(given['max_completion_tokens'])}; "
                       "they mean the same: give one of them", param="max_tokens", code="invalid_value")
    return given["max_completion_tokens"]


def _params(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> SamplingParams:
    try:
        return _checked(SamplingParams(**{**defaults, **given}))
    except SamplingError as error:
        raise ApiError(str(error), param=_blamed(given), code="invalid_value") from None


def _checked(params: SamplingParams) -> SamplingParams:
    """OpenAI's limit of log probabilities is the default of an engine's."""
    params.check_logprobs(MAX_LOGPROBS)
    return params


def _blamed(given: Mapping[str, Any]) -> str | None:
    """The one parameter that is wrong by itself."""
    for key, value in given.items():
        try:
            _checked(SamplingParams(**{key: value}))
        except SamplingError:
            return key
    return None
