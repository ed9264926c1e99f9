"""How fast a loaded model runs a job's own rows, and what that says of all of them."""
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tpllm.engine.outputs import RequestOutput
from tpllm.engine.sampling_params import SamplingParams

BUDGET_S = 15.0
FIRST_LENGTH = 8


@dataclasses.dataclass(frozen=True)
class SampleRow:
    """One prompt of the job as the engine gets it: token ids and parameters."""

    prompt_token_ids: Sequence[int]
    params: SamplingParams

    def longest_completion(self, context: int) -> int:
        """The most tokens that one completion of it can have, where prompt and completion together have at most ``context``."""
        room = context - len(self.prompt_token_ids)
        return room if self.params.max_tokens is None else min(self.params.max_tokens, room)


@dataclasses.dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        num_prompts: of the sample, run together.
        num_seconds: that the measurement took, without compiling.
        num_startup_seconds: of the first pass, most of which is compiling.
        prompt_rate: prompt tokens a second.
        completion_rate: completion tokens a second with the whole sample in the batch; None where no row makes more than one token.
        mean_length: tokens of a completion, where every one came to its own end in time; else None.
    """

    num_prompts: int
    num_seconds: float
    num_startup_seconds: float
    prompt_rate: float
    completion_rate: float | None
    mean_length: float | None

    def seconds(self, prompt_tokens: float, completion_tokens: float) -> float:
        """The time for so many tokens."""
        return prompt_tokens / self.prompt_rate + (completion_tokens / self.completion_rate if self.completion_rate else 0.0)


def measure_speed(llm: Any, sample: Sequence[SampleRow], *, budget_s: float = BUDGET_S, clock: Callable[[], float] = time.monotonic) -> Speed:
    """Run some rows of a job together, several times: once to compile, once for a single token (the speed of prompts), then for twice as many
    tokens each time (the speed of completions), and at last with their own parameters (how long they get).

    Args:
        llm: the engine.
        sample: at least one row; as many as the batch has slots.
        budget_s: about how long this may take after the first pass.
        clock: seconds.
    """
    def timed(max_tokens: int, *, is_natural: bool = False) -> tuple[float, list[RequestOutput]]:
        start = clock()
        requests = (({"prompt_token_ids": list(row.prompt_token_ids)}, _limited(row.params, max_tokens, is_natural=is_natural)) for row in sample)
        outputs = list(llm.generate_iter(requests, on_error="return"))
        return clock() - start, outputs

    context = llm.shapes.max_model_len
    num_startup_seconds, _ = timed(2)
    start = clock()
    prompt_seconds, outputs = timed(1)
    num_sequences = sum(len(output.outputs) for output in outputs)
    completion_rate, longest = None, max(row.longest_completion(context) for row in sample)
    length = FIRST_LENGTH
    while longest > 1:
        seconds, outputs = timed(min(length, longest))
        completion_rate = max(_num_tokens(outputs) - num_sequences, 1) / max(seconds - prompt_seconds, 1e-6)
        if length >= longest or clock() - start + 2 * seconds > budget_s / 2:
            break
        length *= 2
    cap = 1
    if completion_rate is not None:
        cap = max(1, int((budget_s - (clock() - start) - prompt_seconds) * completion_rate / num_sequences))
    _, outputs = timed(cap, is_natural=True)
    is_whole = all(completion.finish_reason == "stop" or len(completion.token_ids) >= row.longest_completion(context)
                   for row, output in _by_row(sample, outputs) for completion in output.outputs)
    return Speed(len(sample), clock() - start, num_startup_seconds, sum(len(row.prompt_token_ids) * row.params.n for row in sample)
                 / max(prompt_seconds, 1e-6), completion_rate, _num_tokens(outputs) / num_sequences if is_whole else None)


def _limited(params: SamplingParams, max_tokens: int, *, is_natural: bool) -> SamplingParams:
    limit = max_tokens if params.max_tokens is None else min(params.max_tokens, max_tokens)
    if is_natural:
        return dataclasses.replace(params, max_tokens=limit, min_tokens=min(params.min_tokens, limit))
    return dataclasses.replace(params, max_tokens=max_tokens, min_tokens=0, ignore_eos=True, stop=(), stop_token_ids=())


def _by_row(sample: Sequence[SampleRow], outputs: Iterable[RequestOutput]) -> Iterable[tuple[SampleRow, RequestOutput]]:
    return ((sample[int(output.request_id)], output) for output in outputs)


def _num_tokens(outputs: Iterable[RequestOutput]) -> int:
    return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
