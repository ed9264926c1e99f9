"""One request and its ``n`` sequences, as the host sees them."""
import dataclasses
import time

from tpllm.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from tpllm.engine.sampling_params import SamplingParams
from tpllm.engine.stop_strings import StopStrings
from tpllm.tokenizer import Detokenizer, Tokenizer


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request that was checked and can be queued.

    Attributes:
        prompt: its text, where it has one.
        prompt_token_ids: at least one.
        params: how it is sampled.
        priority: lower ones come first.
        bad_words: the token sequences of ``params.bad_words``.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    bad_words: list[list[int]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt being completed.

    Attributes:
        output: what the user gets; its completions grow as tokens arrive.
        params: how it is sampled.
        seed: the seed of its random numbers, in [0, 2^64).
        bad_words: token sequences that may not appear.
        priority: lower ones come first.
        number: how many requests came before it.
        sequences: one for each completion.
        num_changes: how many tokens came and completions ended. A reader that remembers the number knows whether there is more to read.
    """

    output: RequestOutput
    params: SamplingParams
    seed: int
    bad_words: list[list[int]] = dataclasses.field(default_factory=list)
    priority: int = 0
    number: int = 0
    sequences: list["Sequence"] = dataclasses.field(default_factory=list)
    num_changes: int = 0

    @property
    def is_finished(self) -> bool:
        """Whether every completion has ended."""
        return self.output.finished


@dataclasses.dataclass(eq=False)
class Sequence:
    """One completion on its way through the engine.

    Attributes:
        request: the request that it belongs to.
        completion: what the user gets.
        detokenizer: makes text of its tokens; None where the model has no tokenizer.
        stops: the strings that end it.
        max_new_tokens: the most tokens that it may generate: what the parameters and the rest of the context allow.
        slot: its place on the device, or None.
        pages: its pages of the KV cache, in order of position; it has some only while it has a slot.
        page_keys: the keys of the first full pages of its context in the prefix cache; see ``engine/pages.py``.
        num_pages_known: how many of its pages the prefix cache knows.
        prefill_len: how many tokens a prefill computes: the length of the context when it last got its slot.
        num_computed: how many positions the dispatched programs write at most.
        least_promised, most_promised: how many tokens the programs that were dispatched and not read yet give it, at least (unless it ends) and at
            most.
        num_preemptions: how often it lost its slot. Tokens of programs that were dispatched before the last time are ignored: they are computed
            again.
        saved: the key of its pages that were saved to the host when it lost its slot; None where there are none.
        last_token_time: when it got its last token, in seconds of ``time.monotonic``.
    """

    request: Request
    completion: CompletionOutput
    detokenizer: Detokenizer | None
    stops: StopStrings
    max_new_tokens: int
    slot: int | None = None
    pages: list[int] = dataclasses.field(default_factory=list)
    page_keys: list[bytes] = dataclasses.field(default_factory=list)
    num_pages_known: int = 0
    prefill_len: int = 0
    num_computed: int = 0
    least_promised: int = 0
    most_promised: int = 0
    num_preemptions: int = 0
    saved: int | None = None
    last_token_time: float | None = None

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.output.prompt_token_ids)

    @property
    def context_len(self) -> int:
        """Tokens of the prompt and of the completion so far."""
        return self.prompt_len + len(self.completion.token_ids)

    def context(self, start: int, stop: int) -> list[int]:
        """Tokens ``start`` to ``stop`` of prompt and completion."""
        prompt = self.request.output.prompt_token_ids
        return prompt[start:stop] + self.completion.token_ids[max(start - len(prompt), 0):max(stop - len(prompt), 0)]

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether its prefill scores every prompt token: only the first prefill of the request's first completion does."""
        return self.request.params.prompt_logprobs is not None and not self.completion.index and not self.completion.token_ids

    @property
    def is_finished(self) -> bool:
        """Whether it has ended."""
        return self.completion.finish_reason is not None

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens of its context are still to be dispatched."""
        return self.num_computed < self.prefill_len

    @property
    def may_go_on(self) -> bool:
        """Whether another decode step may give it a token, as far as the host knows."""
        return not self.is_finished and not self.is_prefilling and self.num_left > 0

    @property
    def least_tokens(self) -> int:
        """The least number of tokens that it has when the programs under way are done, unless it ends."""
        return min(len(self.completion.token_ids) + self.least_promised, self.max_new_tokens)

    @property
    def most_tokens(self) -> int:
        """The most tokens that it can have when the programs under way are done."""
        return min(len(self.completion.token_ids) + self.most_promised, self.max_new_tokens)

    @property
    def num_left(self) -> int:
        """How many tokens it may still get from programs that are not dispatched yet."""
        return self.max_new_tokens - self.least_tokens

    def positions_of(self, num_tokens: int) -> tuple[int, int]:
        """The positions that the next program writes if it gives at most ``num_tokens`` tokens: the lowest, and one past the highest."""
        return self.prompt_len + self.least_tokens - 1, self.prompt_len + min(self.most_tokens + num_tokens, self.max_new_tokens) - 1

    @property
    def num_sure_tokens(self) -> int:
        """How many more tokens it takes at least, whatever the tokens are."""
        params = self.request.params
        ends_early = params.stop or params.stop_token_ids or not params.ignore_eos
        return (min(params.min_tokens, self.max_new_tokens) if ends_early else self.max_new_tokens) - self.most_tokens

    def promise(self, least: int, most: int) -> None:
        """Count a dispatched program that will give it ``least`` to ``most`` tokens; negative numbers count one that was read."""
        self.least_promised += least
        self.most_promised += most

    @property
    def order(self) -> tuple[int, int, int]:
        """The key that rows are ordered by: priority, arrival, index among ``n``."""
        return self.request.priority, self.request.number, self.completion.index

    def push(self, token: int, logprob: float, top: dict[int, Logprob] | None) -> float:
        """Take one drawn token. Returns the seconds since the token before it, or since the request came."""
        now, metrics = time.monotonic(), self.request.output.metrics
        if metrics.first_token_time is None:
            metrics.first_token_time = now
        seconds, self.last_token_time = now - (self.last_token_time or metrics.arrival_time), now
        self.request.num_changes += 1
        self.completion.token_ids.append(token)
        self.completion.cumulative_logprob += logprob
        if top is not None:
            self.completion.logprobs.append(top)
        return seconds

    def show(self, token: int) -> str | None:
        """Add one token to the text. Returns the stop string that it completes, if any; the text is cut there."""
        return self._add_text(self.detokenizer.push([token])) if self.detokenizer is not None else None

    def finish(self, reason: str, *, stop_reason: int | str | None = None, error: str | None = None) -> None:
        """End the completion: add the text that its last tokens still hold, and end the request with its last completion."""
        if self.detokenizer is not None and not isinstance(stop_reason, str):
            stop = self._add_text(self.detokenizer.finish())
            if stop is not None and reason == "length":
                reason, stop_reason = "stop", stop
        self.end(reason, stop_reason=stop_reason, error=error)

    def end(self, reason: str, *, stop_reason: int | str | None = None, error: str | None = None) -> None:
        """End the completion with the text as it is. This cannot fail."""
        self.completion.finish_reason, self.completion.stop_reason, self.completion.error = reason, stop_reason, error
        self.request.num_changes += 1
        output = self.request.output
        if all(sequence.is_finished for sequence in self.request.sequences):
            output.finished, output.metrics.finished_time = True, time.monotonic()

    @property
    def num_certain_chars(self) -> int:
        """How many characters of the text can no longer change."""
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


def new_request(request_id: str, prepared: Prepared, *, seed: int, max_len: int, tokenizer: Tokenizer | None, number: int = 0) -> Request:
    """Make a request with its sequences, ready to be scheduled; a row holds at most ``max_len`` tokens."""
    params, prompt_token_ids = prepared.params, list(prepared.prompt_token_ids)
    output = RequestOutput(request_id=request_id, prompt=prepared.prompt, prompt_token_ids=prompt_token_ids, outputs=[],
                           metrics=RequestMetrics(arrival_time=time.monotonic()))
    if params.prompt_logprobs is not None:
        output.prompt_logprobs = [None]
    request = Request(output=output, params=params, seed=seed, priority=prepared.priority, number=number, bad_words=prepared.bad_words)
    stops = StopStrings(params.stop, is_included=params.include_stop_str_in_output)
    room = max_len - len(prompt_token_ids)
    for index in range(params.n):
        completion = CompletionOutput(index=index, logprobs=None if params.logprobs is None else [])
        output.outputs.append(completion)
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens) if tokenizer and params.detokenize else None
        request.sequences.append(Sequence(request=request, completion=completion, detokenizer=detokenizer, stops=stops,
                                          max_new_tokens=min(room, params.max_tokens or room)))
    return request
