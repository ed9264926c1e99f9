"""One request and its ``n`` sequences, as the host sees them."""
import dataclasses
import time

from tpllm.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from tpllm.engine.sampling_params import SamplingParams
from tpllm.engine.stop_strings import StopStrings
from tpllm.tokenizer import Detokenizer


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt being completed.

    Attributes:
        output: what the user gets; its completions grow as tokens arrive.
        params: how it is sampled.
        seed: of its randomness, in [0, 2^64).
        bad_words: token sequences that may not appear.
        sequences: one for each completion.
    """

    output: RequestOutput
    params: SamplingParams
    seed: int
    bad_words: list[list[int]] = dataclasses.field(default_factory=list)
    sequences: list["Sequence"] = dataclasses.field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        """Whether every completion has ended."""
        return self.output.finished


@dataclasses.dataclass(eq=False)
class Sequence:
    """One completion on its way through the engine.

    Attributes:
        request: whose completion it is.
        completion: what the user gets.
        detokenizer: makes its text; None where the model has no tokenizer.
        stops: the strings that end it.
        max_new_tokens: at most this many, the context's end included.
        slot: where it lives on the device, or None.
        num_prefilled: prompt tokens whose programs have been dispatched.
        num_dispatched: an upper bound of the tokens that dispatched programs will give.
    """

    request: Request
    completion: CompletionOutput
    detokenizer: Detokenizer | None
    stops: StopStrings
    max_new_tokens: int
    slot: int | None = None
    num_prefilled: int = 0
    num_dispatched: int = 0

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.output.prompt_token_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether every prompt token is to be scored."""
        return self.request.params.prompt_logprobs is not None

    @property
    def is_finished(self) -> bool:
        """Whether it has ended."""
        return self.completion.finish_reason is not None

    @property
    def is_prefilling(self) -> bool:
        """Whether chunks of its prompt are still to be dispatched."""
        return self.num_prefilled < self.prompt_len

    @property
    def may_go_on(self) -> bool:
        """Whether another decode step may give it a token, as far as the host knows."""
        return not self.is_finished and not self.is_prefilling and self.num_dispatched < self.max_new_tokens

    def push(self, token: int, logprob: float, top: dict[int, Logprob] | None) -> None:
        """Take one drawn token."""
        if not self.completion.token_ids and self.request.output.metrics.first_token_time is None:
            self.request.output.metrics.first_token_time = time.monotonic()
        self.completion.token_ids.append(token)
        self.completion.cumulative_logprob += logprob
        if top is not None:
            self.completion.logprobs.append(top)

    def show(self, token: int) -> str | None:
        """Add one token to the text; the stop string that this completes, if any, and the text is cut there."""
        return self._add_text(self.detokenizer.push([token])) if self.detokenizer is not None else None

    def finish(self, reason: str, *, stop_reason: int | str | None = None, error: str | None = None) -> None:
        """End the completion, and the request with its last one."""
        if self.detokenizer is not None and not isinstance(stop_reason, str):
            stop = self._add_text(self.detokenizer.finish())
            if stop is not None and reason == "length":
                reason, stop_reason = "stop", stop
        self.completion.finish_reason, self.completion.stop_reason, self.completion.error = reason, stop_reason, error
        output = self.request.output
        if all(sequence.is_finished for sequence in self.request.sequences):
            output.finished, output.metrics.finished_time = True, time.monotonic()

    @property
    def num_certain_chars(self) -> int:
        """Characters of the text that stay, whatever comes."""
        return len(self.completion.text) if self.is_finished else self.stops.num_certain(self.completion.text)

    def _add_text(self, new: str) -> str | None:
        num_checked = len(self.completion.text)
        self.completion.text += new
        if not new or len(self.completion.token_ids) <= self.request.params.min_tokens:
            return None
        found = self.stops.find(self.completion.text, num_checked)
        if found is None:
            return None
        length, stop = found
        self.completion.text = self.completion.text[:length]
        return stop


def new_request(request_id: str, prompt: str | None, prompt_token_ids: list[int], *, params: SamplingParams, seed: int, max_model_len: int,
                tokenizer) -> Request:
    """A request with its sequences, ready to be scheduled."""
    output = RequestOutput(request_id=request_id, prompt=prompt, prompt_token_ids=prompt_token_ids, outputs=[],
                           metrics=RequestMetrics(arrival_time=time.monotonic()))
    request = Request(output=output, params=params, seed=seed)
    stops = StopStrings(params.stop, is_included=params.include_stop_str_in_output)
    room = max_model_len - len(prompt_token_ids)
    for index in range(params.n):
        completion = CompletionOutput(index=index, logprobs=None if params.logprobs is None else [])
        output.outputs.append(completion)
        detokenizer = tokenizer and Detokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
        request.sequences.append(Sequence(request=request, completion=completion, detokenizer=detokenizer, stops=stops,
                                          max_new_tokens=min(room, params.max_tokens or room)))
    return request
