"""What a request gives back: vLLM's names."""
import dataclasses
from typing import TYPE_CHECKING, Literal

from tpllm.errors import ConfigError

if TYPE_CHECKING:
    import pandas

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_SHOWN = 6  # token ids in a repr


class _ShortRepr:
    """A repr of the fields that differ from their defaults; a long list is its length, and of token ids also the first."""

    def __repr__(self) -> str:
        shown = [f"{field.name}={_short(getattr(self, field.name))}" for field in dataclasses.fields(self)
                 if field.repr and not _is_default(field, getattr(self, field.name))]
        return f"{type(self).__name__}({', '.join(shown)})"


def _is_default(field: dataclasses.Field, value) -> bool:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return default is not dataclasses.MISSING and value == default


def _short(value) -> str:
    if not isinstance(value, list) or len(value) <= MAX_SHOWN or isinstance(value[0], _ShortRepr):
        return repr(value)
    first = "".join(f"{token}, " for token in value[:MAX_SHOWN] if isinstance(token, int))
    return f"[{first}... {len(value)} in all]"


@dataclasses.dataclass(frozen=True)
class Logprob:
    """The log probability of one token.

    Attributes:
        logprob: natural logarithm of the model's own probability, before temperature and filters.
        rank: 1 for the likeliest token.
        decoded_token: the token as text.
    """

    logprob: float
    rank: int
    decoded_token: str


@dataclasses.dataclass(repr=False)
class CompletionOutput(_ShortRepr):
    """One completion of a request.

    Attributes:
        index: which of the request's ``n``.
        text: the generated text.
        token_ids: the generated ids, the stop id included.
        cumulative_logprob: sum of the drawn tokens' log probabilities.
        logprobs: for each generated token a dict token id -> :class:`.Logprob`, or None where none were asked for.
        finish_reason: ``"stop"``, ``"length"``, ``"abort"``, ``"error"``; None while it runs.
        stop_reason: what ended it, where it was one of ``stop`` or ``stop_token_ids``.
        error: what went wrong, with ``finish_reason`` ``"error"``.
    """

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    cumulative_logprob: float = 0.0
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    lora_request = None  # vLLM's; there are no adapters here

    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None


@dataclasses.dataclass
class RequestMetrics:
    """When a request passed its stations, in seconds of ``time.monotonic``."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclasses.dataclass(repr=False)
class RequestOutput(_ShortRepr):
    """A request's prompt and completions.

    Attributes:
        request_id: unique within its ``generate`` call: the position of the prompt, as text.
        prompt: the prompt as text, of a chat what its template makes of it; None where token ids were given.
        prompt_token_ids: what the model read.
        prompt_logprobs: for each prompt token a dict id -> :class:`.Logprob`; None for the first token, and as a whole where not asked for.
        outputs: ``n`` completions.
        finished: whether every completion has ended.
        metrics: times.
        num_cached_tokens: prompt tokens whose keys and values were reused.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics = dataclasses.field(repr=False)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = False
    num_cached_tokens: int = 0
    lora_request = None  # vLLM's; there are no adapters here


class RequestOutputs(list[RequestOutput]):
    """The outputs of one call, in the order of its prompts."""

    def to_pandas(self) -> "pandas.DataFrame":
        """A table of a row for each completion.

        Returns:
            Columns ``request_id``, ``prompt``, ``num_prompt_tokens``, and those of :class:`CompletionOutput` but for ``logprobs``.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ConfigError("to_pandas needs pandas; install it with pip install pandas") from None
        names = [field.name for field in dataclasses.fields(CompletionOutput) if field.name != "logprobs"]
        rows = [(output.request_id, output.prompt, len(output.prompt_token_ids), *(getattr(completion, name) for name in names))
                for output in self for completion in output.outputs]
        return pandas.DataFrame(rows, columns=["request_id", "prompt", "num_prompt_tokens", *names])


@dataclasses.dataclass(frozen=True)
class CompletionDelta:
    """What :meth:`tpllm.LLM.stream` adds at a time.

    Attributes:
        index: which of the request's ``n``.
        text: the new text, whole characters only; may be empty while a character is unfinished.
        token_ids: the new tokens.
        finish_reason: set with the last one.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None


def new_part(output: RequestOutput, before: RequestOutput | None) -> RequestOutput:
    """A growing output without the text, tokens and log probabilities that it had before."""
    if before is None:
        return output
    completions = [dataclasses.replace(now, text=now.text[len(old.text):], token_ids=now.token_ids[len(old.token_ids):],
                                       logprobs=None if now.logprobs is None else now.logprobs[len(old.logprobs):])
                   for now, old in zip(output.outputs, before.outputs, strict=True)]
    return dataclasses.replace(output, outputs=completions)


def failed_output(request_id: str, prompt: str | None, message: str) -> RequestOutput:
    """The output of a request that could not begin."""
    completion = CompletionOutput(index=0, finish_reason="error", error=message)
    return RequestOutput(request_id=request_id, prompt=prompt, prompt_token_ids=[], outputs=[completion],
                         metrics=RequestMetrics(arrival_time=0.0), finished=True)
