"""Makes the body of an OpenAI response of what the engine gives back: a ``Completion`` or ``ChatCompletion`` object of the API reference."""
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tpllm.engine.outputs import CompletionOutput, Logprob, RequestOutput
from tpllm.openai_api.api_error import ApiError
from tpllm.openai_api.logprobs import UNLIKELY, chat_logprobs, completion_logprobs, logprobs_by_id
from tpllm.openai_api.requests import ApiRequest
from tpllm.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ResponseHead:
    """What a response says of itself.

    Attributes:
        unique_id: goes behind ``cmpl-`` or ``chatcmpl-``.
        created: seconds since 1970.
        model: that answered.
        system_fingerprint: of model, software and hardware, or None.
    """

    unique_id: str
    created: int
    model: str
    system_fingerprint: str | None = None


def response_body(request: ApiRequest, outputs: Sequence[RequestOutput], head: ResponseHead, *,
                  get_tokenizer: Callable[[], Tokenizer]) -> dict[str, Any]:
    """The body of a request that was run.

    Choices are numbered through the prompts: those of the first, then those of the second.

    Args:
        request: what was asked for.
        outputs: of its prompts, in order.
        head: what the response says of itself.
        get_tokenizer: gives the model's tokenizer; called only for ``echo``.

    Raises:
        ApiError: a prompt that the engine refused (status 400), or a completion that failed (500).
    """
    for index, output in enumerate(outputs):
        _raise_failure(output, f"prompt[{index}]: " if len(outputs) > 1 else "")
    make = _chat_choice if request.is_chat else _completion_choice
    choices: list[dict[str, Any]] = []
    for output in outputs:
        shown = _Shown(request, output, get_tokenizer() if request.is_echo else None)
        choices += [make(shown, completion, len(choices) + place)
                    for place, completion in enumerate(sorted(output.outputs, key=lambda completion: completion.index))]
    kind, prefix = ("chat.completion", "chatcmpl-") if request.is_chat else ("text_completion", "cmpl-")
    body = {"id": prefix + head.unique_id, "object": kind, "created": head.created, "model": head.model, "choices": choices,
            "usage": _usage(request, outputs), "system_fingerprint": head.system_fingerprint}
    if request.is_chat and request.shows_prompt_logprobs:
        body["prompt_logprobs"] = logprobs_by_id(outputs[0].prompt_logprobs, impossible=UNLIKELY)
    return body


class _Shown:
    """One prompt's output and what of it is shown."""

    def __init__(self, request: ApiRequest, output: RequestOutput, tokenizer: Tokenizer | None):
        self.request, self.output = request, output
        self.prompt_text, self._first_token = "", ""
        if tokenizer is not None:
            ids = output.prompt_token_ids
            is_given = output.prompt is not None
            self.prompt_text = output.prompt if is_given else tokenizer.decode(ids, skip_special_tokens=request.params.skip_special_tokens)
            self._first_token = tokenizer.token_text(ids[0])

    def text(self, completion: CompletionOutput) -> str:
        return self.prompt_text + ("" if self.request.is_prompt_only else completion.text)

    def tokens(self, completion: CompletionOutput) -> tuple[list[int], list[Mapping[int, Logprob] | None], list[str]]:
        """Ids, scores and texts of all tokens that are shown; the first one of a prompt has no score."""
        ids, scores = ([], []) if self.request.is_prompt_only else (completion.token_ids, completion.logprobs)
        texts = [entry[token].decoded_token for token, entry in zip(ids, scores, strict=True)]
        if not self.request.is_echo:
            return ids, scores, texts
        prompt_ids, prompt_scores = self.output.prompt_token_ids, self.output.prompt_logprobs
        prompt_texts = [self._first_token, *(entry[token].decoded_token for token, entry in zip(prompt_ids[1:], prompt_scores[1:], strict=True))]
        return [*prompt_ids, *ids], [*prompt_scores, *scores], [*prompt_texts, *texts]


def _completion_choice(shown: _Shown, completion: CompletionOutput, index: int) -> dict[str, Any]:
    text, top = shown.text(completion), shown.request.num_top_logprobs
    choice = {"index": index, "text": text, "finish_reason": "length" if shown.request.is_prompt_only else completion.finish_reason,
              "logprobs": None if top is None else completion_logprobs(text, *shown.tokens(completion), top=top)}
    if shown.request.shows_prompt_logprobs:
        choice["prompt_logprobs"] = logprobs_by_id(shown.output.prompt_logprobs, impossible=UNLIKELY)
    return choice


def _chat_choice(shown: _Shown, completion: CompletionOutput, index: int) -> dict[str, Any]:
    top = shown.request.num_top_logprobs
    return {"index": index, "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "finish_reason": completion.finish_reason,
            "logprobs": None if top is None else chat_logprobs(completion.token_ids, completion.logprobs, top=top)}


def _usage(request: ApiRequest, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_new = 0 if request.is_prompt_only else sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new,
            "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)}}


def _raise_failure(output: RequestOutput, where: str) -> None:
    for completion in output.outputs:
        if completion.finish_reason == "error":
            # A prompt that could not begin was refused for what it is; one that ran has failed here.
            raise ApiError(where + (completion.error or "unknown error"), status=500 if output.prompt_token_ids else 400)
